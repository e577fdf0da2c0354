"""What scheduling and the store count while they work: changed by its owner alone, read at a scrape."""

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Family

from rbee_job_server.metrics import OTHER, Metric
from rbee_queen.retry import HIVE_FAILURES, WORKER_FAILURES

DECISIONS = Metric(
    name="rbee_schedule_decisions_total",
    kind="counter",
    help="How often a place was sought for an inference: `placed`, or `no_worker` where none could take it.",
    labels=("outcome",),
)
SCHEDULE_WAIT = Metric(
    name="rbee_schedule_wait_seconds",
    kind="histogram",
    help="How long an inference waited for its first place: for hives that were only just met, most of it.",
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0),
)
RETRIES = Metric(
    name="rbee_inference_retries_total",
    kind="counter",
    help="Inferences that were tried at another place, by the code with which they had failed.",
    labels=("code",),
)
RETRIES_REFUSED = Metric(
    name="rbee_inference_retries_refused_total",
    kind="counter",
    help="Inferences that failed by their place and were not tried elsewhere: they had `spoken`, had had "
    "their `attempts`, `no_worker` could take them, or the `budget` of retries was used up.",
    labels=("reason",),
)
RETRY_BUDGET = Metric(
    name="rbee_inference_retry_budget",
    kind="gauge",
    help="Retries that all inferences of the queen together may have now; 100 at most.",
)
COMMIT = Metric(
    name="rbee_store_commit_seconds",
    kind="histogram",
    help="How long a commit of the store took, from handing it over until the queen goes on.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
COMMITTED = Metric(
    name="rbee_store_records_total",
    kind="counter",
    help="Records that were written to the store; those that are made close together are one commit.",
)
BACKLOG = Metric(
    name="rbee_store_backlog_records",
    kind="gauge",
    help="Records that wait for the store's next commit.",
)

SCHEDULING_METRICS = (DECISIONS, SCHEDULE_WAIT, RETRIES, RETRIES_REFUSED)
STORE_METRICS = (COMMIT, COMMITTED)

OUTCOMES = ("placed", "no_worker")
REASONS = ("spoken", "attempts", "no_worker", "budget")


class SchedulingMeasures:
    """Counts what scheduling decides. `Inference` owns it."""

    def __init__(self) -> None:
        self._decisions = DECISIONS.counter()
        self._waits = SCHEDULE_WAIT.histogram()
        self._retries = RETRIES.counter()
        self._refused = RETRIES_REFUSED.counter()
        self._placed = self._decisions.labels("placed")
        self._not_placed = self._decisions.labels("no_worker")
        for reason in REASONS:
            self._refused.labels(reason)
        for code in sorted(HIVE_FAILURES | WORKER_FAILURES):
            self._retries.labels(code)

    def decided(self, *, is_placed: bool) -> None:
        """A place was sought."""
        (self._placed if is_placed else self._not_placed).inc()

    def waited(self, seconds: float) -> None:
        """An inference waited so long for its first place."""
        self._waits.observe(seconds)

    def retried(self, code: str) -> None:
        """An inference is tried elsewhere."""
        known = code in HIVE_FAILURES or code in WORKER_FAILURES
        self._retries.labels(code if known else OTHER).inc()

    def refused(self, reason: str) -> None:
        """An inference is not tried elsewhere; `reason` is one of `REASONS`."""
        self._refused.labels(reason).inc()

    def collect(self) -> Iterator[Family]:
        for metric in (self._decisions, self._waits, self._retries, self._refused):
            yield from metric.collect()


class StoreMeasures:
    """Counts what is written to the store. `StoreJournal` owns it."""

    def __init__(self) -> None:
        self._commits = COMMIT.histogram()
        self._records = COMMITTED.counter()

    def committed(self, records: int, seconds: float) -> None:
        """So many records were written by one commit."""
        self._commits.observe(seconds)
        self._records.inc(records)

    def collect(self) -> Iterator[Family]:
        for metric in (self._commits, self._records):
            yield from metric.collect()
