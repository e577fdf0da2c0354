"""What bench-relay found, in tables: medians over the rounds, differences taken within a round."""

import html
from collections.abc import Callable, Iterable
from statistics import median

from msgspec import Struct

from benchmarks.load import LoadResult
from benchmarks.measure import Machine
from benchmarks.report import IMAGES, provenance, publish, save, stacked_bars, table

DIRECT = "direct"
CASCADE = "queen and hive"
PEER = "sglang-router"
COMPARED_AT = 256


class Shape(Struct, frozen=True, kw_only=True):
    """A load: so many streams of so many tokens a second, `tokens` in each, begun `stagger_ms` apart."""

    streams: int
    rate: int
    tokens: int
    stagger_ms: float = 1.0
    probes: int = 0

    @property
    def name(self) -> str:
        return f"{self.streams:,} {'stream' if self.streams == 1 else 'streams'} of {self.rate} tok/s"


class Cell(Struct, frozen=True, kw_only=True):
    """One load on one way in one round."""

    shape: Shape
    way: str
    round: int
    date: str
    load_average: list[float]
    result: LoadResult

    def cpu_us(self, service: str) -> float:
        """CPU time per token of the whole load, its requests' beginnings and ends included."""
        return self.result.services[service].cpu_s / max(1, self.result.tokens) * 1e6

    @property
    def has_steady(self) -> bool:
        """Whether there was a time in which all streams ran."""
        return self.result.steady_tokens > self.result.tokens / 20

    def steady_cpu_us(self, service: str) -> float:
        """CPU time per token while all streams ran; of the whole load where they never did together."""
        if not self.has_steady:
            return self.cpu_us(service)
        return self.result.services[service].steady_cpu_s / self.result.steady_tokens * 1e6

    def request_ms(self, service: str) -> float:
        """CPU time per request: what its tokens do not explain."""
        whole = self.result.services[service].cpu_s
        of_tokens = self.steady_cpu_us(service) * self.result.tokens / 1e6
        return max(0.0, whole - of_tokens) / self.shape.streams * 1e3


class RelayResults(Struct, frozen=True, kw_only=True):
    machine: Machine
    rounds: int
    absent: dict[str, str]
    cells: list[Cell]

    def shapes(self) -> list[Shape]:
        return list(dict.fromkeys(cell.shape for cell in self.cells))

    def ways(self) -> list[str]:
        return list(dict.fromkeys(cell.way for cell in self.cells))

    def of(self, shape: Shape, way: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.shape == shape and cell.way == way]

    def compared(
        self, shape: Shape, way: str, other: str, figure: Callable[[Cell, Cell], float]
    ) -> float | None:
        """Give the median over the rounds of a figure of two ways in one round; None where one is missing."""
        pairs = zip(self.of(shape, way), self.of(shape, other), strict=True)
        values = [figure(cell, against) for cell, against in pairs] if self.of(shape, other) else []
        return median(values) if values else None

    def ratio(self, shape: Shape, service: str, figure: Callable[[Cell, str], float]) -> float | None:
        """Give a service's figure as a share of the peer's."""
        return self.compared(
            shape, CASCADE, PEER, lambda ours, its: figure(ours, service) / figure(its, PEER)
        )


def publish_results(results: RelayResults, *, keep: bool, dry: bool) -> None:
    """Print the tables; unless `dry`, write them, the JSON and the plot."""
    markdown = to_markdown(results)
    if dry:
        print(markdown)
        return
    save("relay", results, keep=keep)
    shape = next((s for s in results.shapes() if s.streams == COMPARED_AT), results.shapes()[-1])
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "bench-relay.svg").write_text(plot(results, shape))
    publish("relay", markdown)


def to_markdown(results: RelayResults) -> str:
    parts = [provenance(results.machine), f"Medians of {results.rounds} rounds.\n"]
    parts += [f"Not measured: {name}: {why}\n" for name, why in results.absent.items()]
    parts.append(_targets(results))
    for shape in results.shapes():
        parts += [f"### {shape.name}\n", streams_table(results, shape), services_table(results, shape)]
    return "\n".join(parts)


def plot(results: RelayResults, shape: Shape) -> str:
    """Draw the CPU time per token of each way, by process."""
    bars = []
    for way in results.ways():
        cells = results.of(shape, way)
        services = cells[0].result.services
        bars.append((html.escape(way), {name: _median(c.cpu_us(name) for c in cells) for name in services}))
    return stacked_bars(f"CPU time per token, {shape.name}", "µs", bars)


def _targets(results: RelayResults) -> str:
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, target: float, unit: str, value: float | None) -> None:
        if value is not None:
            rows.append(
                (what, f"{target:g}{unit}", f"{value:.2f}{unit}", "yes" if value <= target else "**no**")
            )

    for shape in results.shapes():
        if shape.streams == COMPARED_AT:
            for name, most in (("queen", 1.0), ("hive", 0.3)):
                for what, figure in (("CPU", Cell.cpu_us), ("steady CPU", Cell.steady_cpu_us)):
                    ratio = results.ratio(shape, name, figure)
                    add(f"{name}'s {what} per token, of {PEER}'s, {shape.name}", most, " x", ratio)
        elif shape.streams == 1:
            added = results.compared(
                shape, CASCADE, DIRECT, lambda a, b: a.result.ttft_p50_ms - b.result.ttft_p50_ms
            )
            add(f"TTFT that queen and hive add, p50, {shape.name}", 10, " ms", added)
    lost = sum(cell.result.lost + cell.result.doubled for cell in results.cells)
    add("tokens lost or doubled, of all ways", 0, "", lost)
    return table(("target", "at most", "measured", "met"), rows)


def streams_table(results: RelayResults, shape: Shape) -> str:
    heads = ("way", "tok/s", "lost", "TTFT p50 / p99 ms", "added", "between tokens p50 / p99 ms", "added")
    return table(heads, [_streams_of(results, shape, way) for way in results.ways()])


def _streams_of(results: RelayResults, shape: Shape, way: str) -> list[str]:
    cells = results.of(shape, way)

    def added(figure: Callable[[LoadResult], float]) -> str:
        def difference(cell: Cell, direct: Cell) -> float:
            return figure(cell.result) - figure(direct.result)

        value = results.compared(shape, way, DIRECT, difference)
        return "" if way == DIRECT or value is None else f"{value:+.1f}"

    def pair(p50: Callable[[LoadResult], float], p99: Callable[[LoadResult], float]) -> list[str]:
        values = " / ".join(f"{_median(figure(c.result) for c in cells):.1f}" for figure in (p50, p99))
        return [values, f"{added(p50)} / {added(p99)}".strip(" /")]

    return [
        way,
        f"{_median(c.result.tokens_per_s for c in cells):,.0f}",
        str(sum(c.result.lost + c.result.doubled for c in cells)),
        *pair(lambda r: r.ttft_p50_ms, lambda r: r.ttft_p99_ms),
        *pair(lambda r: r.itl_p50_ms, lambda r: r.itl_p99_ms),
    ]


def services_table(results: RelayResults, shape: Shape) -> str:
    rows = []
    for way in results.ways():
        cells = results.of(shape, way)
        for name in cells[0].result.services:
            rss = _median(c.result.services[name].rss_bytes for c in cells) / 2**20
            steady = [cell for cell in cells if cell.has_steady]
            rows.append(
                (
                    f"{way}: {name}",
                    f"{_median(c.cpu_us(name) for c in cells):.1f}",
                    f"{_median(c.steady_cpu_us(name) for c in steady):.1f}" if steady else "",
                    f"{_median(c.request_ms(name) for c in steady):.2f}" if steady else "",
                    f"{rss:.0f}",
                )
            )
    return table(("process", "CPU µs per token", "steady", "CPU ms per request", "RSS MiB"), rows)


def _median(values: Iterable[float]) -> float:
    return median(values)
