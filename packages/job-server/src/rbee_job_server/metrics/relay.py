"""The firehose and the lines to services below, in numbers that are kept anyway and read at a scrape."""

from collections.abc import Iterable, Iterator

from msgspec import Struct
from prometheus_client.metrics_core import Metric as Family

from rbee_job_server.firehose import Firehose
from rbee_job_server.metrics.spec import Metric

FIREHOSE_EVENTS = Metric(
    name="rbee_firehose_events_total",
    kind="counter",
    help="Events of all jobs of this service, as the firehose counts them.",
)
FIREHOSE_FOLLOWERS = Metric(
    name="rbee_firehose_followers",
    kind="gauge",
    help="Who follows this service's firehose now: the service above, and dashboards.",
)
FIREHOSE_GAPS = Metric(
    name="rbee_firehose_gaps_total",
    kind="counter",
    help="How often a follower of this service's firehose was told that it has missed events.",
)
FIREHOSE_BACKLOG = Metric(
    name="rbee_firehose_backlog_events",
    kind="gauge",
    help="Events that the slowest follower of this service's firehose has not taken yet.",
)
FIREHOSE_RING = Metric(
    name="rbee_firehose_ring_bytes",
    kind="gauge",
    help="Bytes of events that are kept for followers whose connection drops; bounded by 8 MiB.",
)
RELAY_CONNECTED = Metric(
    name="rbee_relay_connected",
    kind="gauge",
    help="1 while the firehose of the service below is followed, else 0.",
    labels=("peer",),
)
RELAY_SILENCE = Metric(
    name="rbee_relay_silence_seconds",
    kind="gauge",
    help="Age of the last bytes from the firehose of the service below, by this machine's clock alone. It "
    "sends something every 15 s at the latest.",
    labels=("peer",),
)
RELAY_LAG = Metric(
    name="rbee_relay_lag_seconds",
    kind="summary",
    help="From when a piece of the firehose below was read until all its events were handed to their jobs; "
    "one observation for each piece.",
    labels=("peer",),
)
RELAY_STEPS = Metric(
    name="rbee_relay_steps",
    kind="gauge",
    help="Steps of jobs that run on the service below for this one.",
    labels=("peer",),
)
RELAY_GAPS = Metric(
    name="rbee_relay_gaps_total",
    kind="counter",
    help="How often the service below said that its firehose has lost events for this one.",
    labels=("peer",),
)
RELAY_REREADS = Metric(
    name="rbee_relay_rereads_total",
    kind="counter",
    help="Jobs below whose own stream was read because the firehose had lost some of it, or after a restart.",
    labels=("peer",),
)

FIREHOSE_METRICS = (
    FIREHOSE_EVENTS,
    FIREHOSE_FOLLOWERS,
    FIREHOSE_GAPS,
    FIREHOSE_BACKLOG,
    FIREHOSE_RING,
)
RELAY_METRICS = (
    RELAY_CONNECTED,
    RELAY_SILENCE,
    RELAY_LAG,
    RELAY_STEPS,
    RELAY_GAPS,
    RELAY_REREADS,
)


class Handed(Struct):
    """What a relay has counted: only the relay changes it.

    Args:
        pieces: pieces of the firehose that were read.
        seconds: from the reading of each until its events were handed to their jobs, together.
        gaps: gaps that the service below told of.
        rereads: jobs whose own stream was read instead.
    """

    pieces: int = 0
    seconds: float = 0.0
    gaps: int = 0
    rereads: int = 0


class Line(Struct, frozen=True, kw_only=True):
    """The line to one service below, as it is now. `silence_s` is None before its first byte."""

    peer: str
    is_connected: bool
    silence_s: float | None
    steps: int
    handed: Handed


def firehose_families(firehose: Firehose) -> Iterator[Family]:
    """Tell of this service's own firehose."""
    yield FIREHOSE_EVENTS.is_value(firehose.seq)
    yield FIREHOSE_FOLLOWERS.is_value(firehose.followers)
    yield FIREHOSE_GAPS.is_value(firehose.gaps)
    yield FIREHOSE_BACKLOG.is_value(firehose.backlog)
    yield FIREHOSE_RING.is_value(firehose.ring_bytes)


def relay_families(lines: Iterable[Line]) -> Iterator[Family]:
    """Tell of the lines to the services below."""
    lines = list(lines)
    yield RELAY_CONNECTED.told(((line.peer,), line.is_connected) for line in lines)
    yield RELAY_SILENCE.told(((line.peer,), line.silence_s) for line in lines if line.silence_s is not None)
    yield RELAY_LAG.summary(((line.peer,), line.handed.pieces, line.handed.seconds) for line in lines)
    yield RELAY_STEPS.told(((line.peer,), line.steps) for line in lines)
    yield RELAY_GAPS.told(((line.peer,), line.handed.gaps) for line in lines)
    yield RELAY_REREADS.told(((line.peer,), line.handed.rereads) for line in lines)
