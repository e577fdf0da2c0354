"""One request's log lines from the whole cluster: the queen's own, and what every hive finds."""

import anyio
import msgspec

from rbee_contracts.errors import RbeeError
from rbee_contracts.nodes import LogSearchResult
from rbee_contracts.operations import LogSearch
from rbee_job_server import JobContext
from rbee_job_server.log_search import LogRing, kept_since, newest, own_lines
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
        lines = newest(own_lines(self._ring, op, "queen"), op.limit)
        notes = [kept_since(self._ring, "queen")]
        for hive_id in sorted(found):
            lines += found[hive_id].lines
            notes += found[hive_id].notes
        return LogSearchResult(correlation_id=op.correlation_id, lines=lines, silent=silent, notes=notes)
