"""What Alembic runs around the migrations; `migrate.py` gives it the connection and the transaction."""

from alembic import context

from rbee_queen.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()
