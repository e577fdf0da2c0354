"""What bench-openai found, in tables: the front door beside other proxies, and real vLLM behind it."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import TypeAlias

from msgspec import Struct

from benchmarks.measure import Machine
from benchmarks.relay_report import CASCADE, Cell, RelayResults, Shape, services_table, streams_table
from benchmarks.report import provenance, publish, save, table

ROUTER = "sglang-router"
LITELLM = "litellm"
OURS = ("queen", "hive")
"""What rbee puts in front of a worker."""

TIMES_PER_TOKEN = 20.0
TIMES_PER_REQUEST = 10.0
"""How much less than litellm the front door should take."""

THROUGHPUT_SHARE = 0.9

Figure: TypeAlias = Callable[[Cell], float | None]


class Run(Struct, frozen=True, kw_only=True):
    """One run of `vllm bench serve`. Times in milliseconds, CPU in seconds by process."""

    way: str
    streams: int
    round: int
    tokens_per_s: float
    ttft_p50_ms: float
    itl_p50_ms: float
    completed: int
    failed: int
    cpu_s: dict[str, float]


class VllmResults(Struct, frozen=True, kw_only=True):
    machine: Machine
    rounds: int
    runs: list[Run]

    def of(self, way: str, streams: int) -> list[Run]:
        return [run for run in self.runs if (run.way, run.streams) == (way, streams)]

    def streams(self) -> list[int]:
        return sorted({run.streams for run in self.runs})


STRAIGHT = "straight"
THROUGH = "through rbee"


def publish_proxies(results: RelayResults, *, keep: bool, dry: bool) -> None:
    """Print the tables of the proxies; unless `dry`, write them and the JSON."""
    markdown = proxies_markdown(results)
    if dry:
        print(markdown)
        return
    save("openai", results, keep=keep)
    publish("openai", markdown)


def proxies_markdown(results: RelayResults) -> str:
    parts = [provenance(results.machine), f"Medians of {results.rounds} rounds.\n"]
    parts += [f"Not measured: {name}: {why}\n" for name, why in results.absent.items()]
    parts.append(_targets(results))
    for shape in results.shapes():
        heading = f"### {shape.name}, {shape.tokens} tokens each\n"
        parts += [heading, streams_table(results, shape), services_table(results, shape)]
    return "\n".join(parts)


def _targets(results: RelayResults) -> str:
    rows: list[tuple[str, str, str, str]] = []
    for shape in results.shapes():
        for what, figure, times in _figures(shape):
            value = _ratio(results, shape, LITELLM, figure)
            if value is not None:
                rows.append(
                    _row(f"litellm's {what}, of rbee's, {shape.name}", times, 1 / value, at_least=True)
                )
            value = _ratio(results, shape, ROUTER, figure)
            if value is not None and figure is _cpu_per_token:
                rows.append(_row(f"rbee's {what}, of {ROUTER}'s, {shape.name}", 1.0, value, at_least=False))
    return table(("target", "bound", "measured", "met"), rows)


def _figures(shape: Shape) -> Sequence[tuple[str, Figure, float]]:
    """Give what is compared; the shortest requests are compared whole, as they have no steady tokens."""
    if shape.tokens <= 2:
        return [("CPU per request", _cpu_of_requests, TIMES_PER_REQUEST)]
    return [
        ("CPU per token", _cpu_per_token, TIMES_PER_TOKEN),
        ("CPU per request beside its tokens", _cpu_per_request, TIMES_PER_REQUEST),
    ]


def _ratio(results: RelayResults, shape: Shape, peer: str, figure: Figure) -> float | None:
    """Give rbee's figure as a share of a peer's; None where either cannot be told."""
    if peer not in results.ways():
        return None
    ratios = []
    for ours, its in zip(results.of(shape, CASCADE), results.of(shape, peer), strict=True):
        a, b = figure(ours), figure(its)
        if a is None or not b:
            return None
        ratios.append(a / b)
    return median(ratios)


def _own(cell: Cell) -> list[str]:
    """Give the processes that stand in front of the worker."""
    return [name for name in cell.result.services if name != "worker"]


def _cpu_per_token(cell: Cell) -> float | None:
    """CPU time per token while all streams run; None where they never did together."""
    return sum(cell.steady_cpu_us(name) for name in _own(cell)) if cell.has_steady else None


def _cpu_per_request(cell: Cell) -> float | None:
    """CPU time of a request's beginning and end."""
    return sum(cell.request_ms(name) for name in _own(cell)) if cell.has_steady else None


def _cpu_of_requests(cell: Cell) -> float:
    """CPU time of a whole request, its few tokens included."""
    return sum(cell.result.services[name].cpu_s for name in _own(cell)) / cell.shape.streams


def _row(what: str, bound: float, value: float, *, at_least: bool) -> tuple[str, str, str, str]:
    is_met = value >= bound if at_least else value <= bound
    sign = "≥" if at_least else "≤"
    return what, f"{sign} {bound:g} x", f"{value:.2f} x", "yes" if is_met else "**no**"


def publish_vllm(results: VllmResults, *, keep: bool, dry: bool) -> None:
    """Print the tables of real vLLM; unless `dry`, write them and the JSON."""
    markdown = vllm_markdown(results)
    if dry:
        print(markdown)
        return
    save("openai-vllm", results, keep=keep)
    publish("openai-vllm", markdown)


def vllm_markdown(results: VllmResults) -> str:
    parts = [provenance(results.machine), f"Medians of {results.rounds} rounds.\n"]
    rows = []
    for streams in results.streams():
        straight, through = results.of(STRAIGHT, streams), results.of(THROUGH, streams)
        pairs = list(zip(straight, through, strict=True))
        share = median(t.tokens_per_s / s.tokens_per_s for s, t in pairs)
        rows.append(
            (
                f"{streams}",
                f"{median(r.tokens_per_s for r in straight):,.0f}",
                f"{median(r.tokens_per_s for r in through):,.0f}",
                f"{share:.2f}",
                "yes" if share >= THROUGHPUT_SHARE else "**no**",
                f"{median(t.ttft_p50_ms - s.ttft_p50_ms for s, t in pairs):+.1f}",
                f"{median(t.itl_p50_ms - s.itl_p50_ms for s, t in pairs):+.2f}",
                str(sum(run.failed for run in straight + through)),
            )
        )
    heads = (
        *("streams", "straight tok/s", "through rbee tok/s", "share", f"≥ {THROUGHPUT_SHARE:g}"),
        *("TTFT p50 added ms", "between tokens p50 added ms", "failed"),
    )
    parts.append(table(heads, rows))
    cpu_rows = []
    for streams in results.streams():
        for way in (STRAIGHT, THROUGH):
            runs = results.of(way, streams)
            shares = "; ".join(f"{name} {median(r.cpu_s[name] for r in runs):.1f}" for name in runs[0].cpu_s)
            cpu_rows.append((f"{streams}, {way}", shares))
    parts.append(table(("streams, way", "CPU seconds by process"), cpu_rows))
    return "\n".join(parts)
