"""How records are written: each type's statements, compiled once, in the order in which they run."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct
from sqlalchemy import ClauseElement, Dialect, bindparam, false, literal_column, or_, select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import Integer, LargeBinary, Text

from rbee_queen.store.payloads import split
from rbee_queen.store.records import (
    FirstOutput,
    HiveForgotten,
    HiveSeen,
    JobAccepted,
    JobEnded,
    JobStarted,
    Narrated,
    Record,
    StepTaken,
)
from rbee_queen.store.schema import events, hives, jobs, payloads, steps

Row: TypeAlias = dict[str, Any]

_to_row: Callable[[Struct], Row] = msgspec.structs.asdict
_is_open = jobs.c.finished_at.is_(None)
_is_this = jobs.c.job_id == bindparam("job_id", type_=Text())


class Writer:
    """Turns records into (SQL, rows) of one dialect. The dialect's parameters must have names.

    Every statement can be repeated: it inserts what is not there, and changes what has not been changed.
    Records of one type are written together; that keeps the order of the records of any one job, as
    their types come in the order in which a job makes them.
    """

    def __init__(self, dialect: Dialect, *, store_payloads: bool) -> None:
        insert: Any = sqlite.insert if dialect.name == "sqlite" else postgresql.insert

        def insert_for_job(table: Any, **values: ColumnElement[Any]) -> ClauseElement:
            source = select(jobs.c.seq, *values.values()).where(_is_this, _is_open)
            added: ClauseElement = (
                insert(table).from_select(["seq", *values], source).on_conflict_do_nothing()
            )
            return added

        event: dict[str, ColumnElement[Any]] = {
            "n": bindparam("n", type_=Integer()),
            "i": bindparam("i", type_=Integer()),
            "body": bindparam("body", type_=LargeBinary()),
        }
        accepted = {
            column.name: bindparam(column.name, type_=column.type)
            for column in jobs.c
            if column.name in JobAccepted.__struct_fields__
        }
        seen = insert(hives).values(
            hive_id=bindparam("hive_id"), url=bindparam("url"), boot=bindparam("boot")
        )
        new = seen.excluded
        plan: list[tuple[type[Struct], list[ClauseElement]]] = [
            (
                JobAccepted,
                [
                    insert(jobs)
                    .values(state=literal_column("'pending'"), has_spoken=false(), **accepted)
                    .on_conflict_do_nothing(index_elements=[jobs.c.job_id]),
                    insert_for_job(payloads, body=bindparam("payload", type_=LargeBinary())),
                ],
            ),
            (
                JobStarted,
                [
                    jobs.update()
                    .where(_is_this, _is_open, jobs.c.started_at.is_(None))
                    .values(state=literal_column("'running'"), started_at=bindparam("started_at"))
                ],
            ),
            (Narrated, [insert_for_job(events, lower_n=bindparam("lower_n", type_=Integer()), **event)]),
            (
                StepTaken,
                [
                    insert_for_job(
                        steps,
                        attempt=bindparam("attempt", type_=Integer()),
                        **{
                            name: bindparam(name, type_=Text())
                            for name in ("step", "hive_id", "lower_job_id")
                        },
                    )
                ],
            ),
            (
                FirstOutput,
                [
                    jobs.update()
                    .where(_is_this, _is_open, jobs.c.has_spoken.is_(False))
                    .values(has_spoken=true())
                ],
            ),
            (JobEnded, self._ending(insert_for_job(events, **event), store_payloads)),
            # Before those that are seen: one that is forgotten may come back at once. One that is seen is
            # lost, and forgotten, in the same write only where the store stood still for that long.
            (HiveForgotten, [hives.delete().where(hives.c.hive_id == bindparam("hive_id", type_=Text()))]),
            (
                HiveSeen,
                [
                    seen.on_conflict_do_update(
                        index_elements=[hives.c.hive_id],
                        set_={"url": new.url, "boot": new.boot},
                        where=or_(hives.c.url != new.url, hives.c.boot != new.boot),
                    )
                ],
            ),
        ]
        self._plan = [(kind, [_compile(each, dialect) for each in executables]) for kind, executables in plan]

    @staticmethod
    def _ending(last_event: ClauseElement, store_payloads: bool) -> list[ClauseElement]:
        """The terminal event first and the state last: after that the job takes no more records."""
        this_seq = select(jobs.c.seq).where(_is_this).scalar_subquery()
        erase = payloads.delete().where(payloads.c.seq == this_seq)
        end = (
            jobs.update()
            .where(_is_this, _is_open)
            .values(
                state=bindparam("state"),
                finished_at=bindparam("finished_at"),
                error=bindparam("error"),
                usage=bindparam("usage"),
                result=bindparam("result"),
            )
        )
        return [last_event, end] if store_payloads else [last_event, erase, end]

    def statements(self, records: Sequence[Record]) -> list[tuple[str, list[Row]]]:
        """Give what writes these records, in order."""
        groups: dict[type[Struct], list[Row]] = {}
        for record in records:
            groups.setdefault(type(record), []).append(_to_row(record))
        found = []
        for kind, statements in self._plan:
            rows = groups.get(kind)
            if rows is None:
                continue
            if kind is JobAccepted:
                found += _accepting(statements, rows)
            else:
                found += [(sql, rows) for sql in statements]
        return found


def _accepting(statements: list[str], rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Take the text of the requests apart; only a job with a key needs its digest ever again."""
    add_jobs, add_payloads = statements
    texts = []
    for row in rows:
        row["operation"], payload = split(row["operation"])
        if row["idempotency_key"] is None:
            row["digest"] = b""
        if payload is not None:
            texts.append({"job_id": row["job_id"], "payload": payload})
    return [(add_jobs, rows), (add_payloads, texts)] if texts else [(add_jobs, rows)]


def _compile(statement: ClauseElement, dialect: Dialect) -> str:
    return str(statement.compile(dialect=dialect))
