"""What a metric is called, what it means, which labels it has: declared once, for the code and its page."""

from collections.abc import Iterable, Sequence
from typing import Generic, Literal, TypeAlias, TypeVar

from msgspec import Struct
from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric as Family

Kind: TypeAlias = Literal["counter", "gauge", "histogram", "summary"]
Sample: TypeAlias = tuple[Sequence[str], float]
"""The values of a metric's labels, in their order, and its value."""

OTHER = "other"
"""Stands for every value of a label that is none of its known ones."""


M = TypeVar("M", Counter, Histogram)


class ByLabels(dict[tuple[str, ...], M], Generic[M]):
    """A metric by the values of its labels: the library's own look-up costs several times as much."""

    def __init__(self, metric: M) -> None:
        super().__init__()
        self.metric: M = metric

    def __missing__(self, labels: tuple[str, ...]) -> M:
        child: M = self.metric.labels(*labels)
        self[labels] = child
        return child


class Metric(Struct, frozen=True, kw_only=True):
    """One metric, by the name under which it is told.

    Args:
        help: its meaning, in one sentence or two; the documentation says the same.
        labels: their names, in the order in which values are given.
        buckets: of a histogram, upper bounds without the infinite one.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def counter(self) -> Counter:
        """Make what counts it. It belongs to no registry: a collector tells it."""
        assert self.kind == "counter"
        return Counter(self.name, self.help, self.labels, registry=None)

    def histogram(self) -> Histogram:
        """Make what observes it. It belongs to no registry: a collector tells it."""
        assert self.kind == "histogram"
        return Histogram(self.name, self.help, self.labels, registry=None, buckets=self.buckets)

    def told(self, samples: Iterable[Sample]) -> Family:
        """Give it with values that are kept elsewhere."""
        family: CounterMetricFamily | GaugeMetricFamily
        match self.kind:
            case "counter":
                family = CounterMetricFamily(self.name, self.help, labels=self.labels)
            case "gauge":
                family = GaugeMetricFamily(self.name, self.help, labels=self.labels)
            case _:
                raise ValueError(f"{self.name} is a {self.kind}")
        for labels, value in samples:
            family.add_metric(list(labels), value)
        return family

    def summary(self, samples: Iterable[tuple[Sequence[str], int, float]]) -> Family:
        """Give a summary with counts and sums that are kept elsewhere."""
        assert self.kind == "summary"
        family = SummaryMetricFamily(self.name, self.help, labels=self.labels)
        for labels, count, total in samples:
            family.add_metric(list(labels), count_value=count, sum_value=total)
        return family

    def is_value(self, value: float) -> Family:
        """Give it where it has no labels."""
        return self.told([((), value)])
