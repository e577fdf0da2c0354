"""What bench-jobs found, in tables."""

from typing import Self

from msgspec import Struct

from benchmarks.measure import Machine, percentile
from benchmarks.report import provenance, publish, save, table


class Times(Struct, frozen=True, kw_only=True):
    """Milliseconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        values = sorted(values)
        return cls(p50=percentile(values, 0.5), p99=percentile(values, 0.99))

    def __str__(self) -> str:
        return f"{self.p50:.2f} / {self.p99:.2f}"


class Latency(Struct, frozen=True, kw_only=True):
    """What a caller waits for, at one job at a time.

    `connect`: from opening a connection to the head of the answer; `first_event`: from the submit on.
    """

    operation: str
    submit: Times
    connect: Times
    first_event: Times


class Rate(Struct, frozen=True, kw_only=True):
    """How many a second, and the queen's CPU time for one."""

    name: str
    per_s: float
    cpu_ms: float


class Memory(Struct, frozen=True, kw_only=True):
    """What one of `jobs` jobs takes of the queen's resident memory."""

    name: str
    jobs: int
    bytes_per_job: float


class JobsResults(Struct, frozen=True, kw_only=True):
    machine: Machine
    latencies: list[Latency]
    rates: list[Rate]
    memories: list[Memory]


def publish_results(results: JobsResults, *, keep: bool, dry: bool) -> None:
    """Print the tables; unless `dry`, write them and the JSON."""
    markdown = to_markdown(results)
    if dry:
        print(markdown)
        return
    save("jobs", results, keep=keep)
    publish("jobs", markdown)


def to_markdown(results: JobsResults) -> str:
    return "\n".join(
        [
            provenance(results.machine),
            _targets(results),
            "### Times\n",
            table(
                ("operation", "submit p50 / p99 ms", "connect p50 / p99 ms", "first event p50 / p99 ms"),
                [(f"`{of.operation}`", of.submit, of.connect, of.first_event) for of in results.latencies],
            ),
            "### Rates\n",
            table(
                ("what", "a second", "queen's CPU ms each"),
                [(rate.name, f"{rate.per_s:,.0f}", f"{rate.cpu_ms:.2f}") for rate in results.rates],
            ),
            "### Memory\n",
            table(
                ("jobs", "number", "KB each"),
                [(of.name, f"{of.jobs:,}", f"{of.bytes_per_job / 1000:.1f}") for of in results.memories],
            ),
        ]
    )


def _targets(results: JobsResults) -> str:
    rows = []
    infer = results.latencies[0]
    for what, most, value in (
        ("submit, p50", 1, infer.submit.p50),
        ("connect, p50", 10, infer.connect.p50),
        ("first event, p50", 100, infer.first_event.p50),
    ):
        rows.append((what, f"{most} ms", f"{value:.2f} ms", _met(value <= most)))
    for memory in results.memories[:2]:
        kb = memory.bytes_per_job / 1000
        rows.append((f"memory of a job, {memory.name}", "9 KB", f"{kb:.1f} KB", _met(kb <= 9)))
    return table(("target", "at most", "measured", "met"), rows)


def _met(is_met: bool) -> str:
    return "yes" if is_met else "**no**"
