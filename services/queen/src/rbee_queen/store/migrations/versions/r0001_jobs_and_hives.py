"""Jobs with their narration and steps, and hives."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

Seq = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("seq", Seq, autoincrement=False, nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("correlation_id", sa.Text, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("started_at", Time),
        sa.Column("finished_at", Time),
        sa.Column("has_spoken", sa.Boolean, nullable=False),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("starts_at_once", sa.Boolean, nullable=False),
        sa.Column("resume_window_s", sa.Float(53)),
        sa.Column("timeout_s", sa.Float(53)),
        sa.Column("operation", sa.LargeBinary, nullable=False),
        sa.Column("error", sa.LargeBinary),
        sa.Column("usage", sa.LargeBinary),
        sa.Column("result", sa.LargeBinary),
        sa.PrimaryKeyConstraint("seq", name="jobs_pkey"),
        sa.UniqueConstraint("job_id", name="jobs_job_id_key"),
    )
    unfinished = sa.text("finished_at IS NULL")
    finished = sa.text("finished_at IS NOT NULL")
    op.create_index("jobs_unfinished", "jobs", ["seq"], sqlite_where=unfinished, postgresql_where=unfinished)
    op.create_index(
        "jobs_finished", "jobs", ["finished_at", "seq"], sqlite_where=finished, postgresql_where=finished
    )
    op.create_table(
        "payloads",
        sa.Column("seq", Seq, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="payloads_pkey"),
        sa.ForeignKeyConstraint(["seq"], ["jobs.seq"], name="payloads_seq_fkey", ondelete="CASCADE"),
    )
    op.create_table(
        "events",
        sa.Column("seq", Seq, nullable=False),
        sa.Column("n", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("i", sa.Integer, nullable=False),
        sa.Column("lower_n", sa.Integer),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("seq", "n", name="events_pkey"),
        sa.ForeignKeyConstraint(["seq"], ["jobs.seq"], name="events_seq_fkey", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "steps",
        sa.Column("seq", Seq, nullable=False),
        sa.Column("attempt", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("step", sa.Text, nullable=False),
        sa.Column("hive_id", sa.Text, nullable=False),
        sa.Column("lower_job_id", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("seq", "attempt", "step", name="steps_pkey"),
        sa.ForeignKeyConstraint(["seq"], ["jobs.seq"], name="steps_seq_fkey", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "hives",
        sa.Column("hive_id", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("boot", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("hive_id", name="hives_pkey"),
    )
    op.create_table(
        "counters",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("value", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="counters_pkey"),
    )
