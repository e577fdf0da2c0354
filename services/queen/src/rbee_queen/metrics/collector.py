"""The queen's state as it is at a scrape: her fleet, her scheduling, her store."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from rbee_contracts.nodes import HiveState
from rbee_job_server.metrics import Line, Metric, relay_families
from rbee_queen.fleet import Fleet, Hive
from rbee_queen.inference import Inference
from rbee_queen.journal import StoreJournal
from rbee_queen.metrics.measures import (
    BACKLOG,
    RETRY_BUDGET,
    SCHEDULING_METRICS,
    STORE_METRICS,
)
from rbee_queen.openai.aliases import Alias

HIVES = Metric(
    name="rbee_hives",
    kind="gauge",
    help="Hives that the queen knows, by state.",
    labels=("state",),
)
HIVE_SILENCE = Metric(
    name="rbee_hive_silence_seconds",
    kind="gauge",
    help="How long ago a hive was last heard, by the queen's own clock. Its heartbeats come every second.",
    labels=("hive",),
)

QUEEN_METRICS = (
    HIVES,
    HIVE_SILENCE,
    *SCHEDULING_METRICS,
    RETRY_BUDGET,
    *STORE_METRICS,
    BACKLOG,
)

STATES: tuple[HiveState, ...] = get_args(HiveState)


class QueenCollector(Collector):
    """Reads what fleet, scheduling and journal own; it changes nothing and keeps nothing.

    Args:
        now: the queen's monotonic clock, in seconds.
    """

    def __init__(
        self,
        fleet: Fleet,
        inference: Inference,
        journal: StoreJournal,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._inference = inference
        self._journal = journal
        self._now = now

    def collect(self) -> Iterator[Family]:
        now, hives = self._now(), self._fleet.hives
        states = Counter(hive.state for hive in hives)
        yield HIVES.told(((state,), states[state]) for state in STATES)
        yield HIVE_SILENCE.told(((hive.id,), hive.life.silence_s(now)) for hive in hives)
        yield from relay_families(_line(hive, now) for hive in hives)
        yield from self._inference.measures.collect()
        yield RETRY_BUDGET.is_value(self._inference.retries_left)
        yield from self._journal.measures.collect()
        yield BACKLOG.is_value(self._journal.backlog)


def _line(hive: Hive, now: float) -> Line:
    heard_at = hive.client.heard_at
    return Line(
        peer=hive.id,
        is_connected=hive.relay.is_connected,
        silence_s=None if heard_at is None else max(0.0, now - heard_at),
        steps=hive.relay.steps,
        handed=hive.relay.handed,
    )


def model_labels(hives: Iterable[Hive], aliases: Iterable[Alias]) -> dict[str, str]:
    """Give the label of every name by which a loaded model may be asked for: the name of the model."""
    labels = {worker.model: worker.model for hive in hives for worker in hive.workers}
    labels.update({alias.name: alias.model for alias in aliases if alias.model in labels})
    return labels
