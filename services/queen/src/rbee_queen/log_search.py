"""One request's log lines from the whole cluster: the queen's own, and what every hive finds."""

import anyio
import msgspec
from anyio import to_thread

from rbee_contracts.errors import RbeeError
from rbee_contracts.nodes import LogSearchResult
from rbee_contracts.operations import LogSearch
from rbee_job_server import JobContext
from rbee_job_server.log_search import MAX_RESULT_BYTES, LogRing, kept_since, newest, own_lines
from rbee_queen.fleet import Fleet, Hive

HIVE_LIMIT_S = 30.0
"""How long one hive may search. The others' lines do not wait for ever for one that is slow."""


class ClusterLogs:
    """Executes `log_search` for the cluster."""

    def __init__(self, ring: LogRing, fleet: Fleet) -> None:
        self._ring = ring
        self._fleet = fleet

    async def __call__(self, op: LogSearch, context: JobContext) -> LogSearchResult:
        """Gather a request's lines. A hive that does not answer is named, and takes nothing from the rest.

        Raises:
            NotFound: the hive that it names is not known.
        """
        hives = self._fleet.hives if op.hive_id is None else [self._fleet.get(op.hive_id)]
        found: dict[str, LogSearchResult] = {}
        silent: dict[str, str] = {}

        async def ask(number: int, hive: Hive) -> None:
            try:
                with anyio.fail_after(HIVE_LIMIT_S):
                    self._fleet.reachable(hive.id)
                    asked = msgspec.structs.replace(op, hive_id=hive.id)
                    result = await hive.relay.perform(context, asked, step=op.name, attempt=number)
                found[hive.id] = msgspec.convert(result, LogSearchResult)
            except RbeeError as exc:
                silent[hive.id] = exc.details
            except TimeoutError:
                silent[hive.id] = f"It did not answer within {HIVE_LIMIT_S:g} s."
            except msgspec.ValidationError as exc:
                silent[hive.id] = f"It answered what this queen does not understand: {exc}"

        async with anyio.create_task_group() as tasks:
            for number, hive in enumerate(hives):
                tasks.start_soon(ask, number, hive)
        share = MAX_RESULT_BYTES // (1 + len(found))
        own = await to_thread.run_sync(own_lines, self._ring, op, "queen")
        lines = newest(own, op.limit, share)
        notes = [kept_since(self._ring, "queen")]
        for hive_id in sorted(found):
            kept = newest(found[hive_id].lines, op.limit, share)
            lines += kept
            notes += found[hive_id].notes
            if len(kept) < len(found[hive_id].lines):
                notes.append(
                    f"Of {hive_id}'s lines the {len(found[hive_id].lines) - len(kept)} oldest are left out: "
                    "they are too many for one answer; ask only this hive, or for less with `since_s`."
                )
        return LogSearchResult(correlation_id=op.correlation_id, lines=lines, silent=silent, notes=notes)
