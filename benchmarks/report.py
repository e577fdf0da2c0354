"""Where figures go: JSON in `results/`, Markdown on the terminal and in `docs/benchmarks.md`, and SVG."""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.measure import Machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/benchmarks.md"
IMAGES = ROOT / "docs/images"


def save(bench: str, results: object, *, keep: bool) -> None:
    """Write `<bench>-latest.json`; with `keep` also a copy under the date."""
    text = msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"
    date = str(msgspec.to_builtins(results)["machine"]["date"])[:16].replace(":", "")
    RESULTS.mkdir(exist_ok=True)
    for name in ("latest", date) if keep else ("latest",):
        (RESULTS / f"{bench}-{name}.json").write_bytes(text)


def publish(bench: str, markdown: str) -> None:
    """Print the tables, and put them between the marks of this bench in the documentation's page."""
    print(markdown)
    begin, end = f"<!-- {bench}: written by make bench-{bench} -->", f"<!-- end of {bench} -->"
    block = f"{begin}\n\n{markdown.strip()}\n\n{end}"
    page, found = re.subn(
        re.escape(begin) + ".*?" + re.escape(end), lambda _: block, PAGE.read_text(), flags=re.DOTALL
    )
    if not found:
        raise ValueError(f"{PAGE} has no place for {bench}: a line {begin!r} and a line {end!r}")
    PAGE.write_text(page)


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a Markdown table; the first column is text, the others are figures."""
    lines = [" | ".join(heads), " | ".join(["---"] + ["---:"] * (len(heads) - 1))]
    lines += [" | ".join(map(str, row)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def provenance(machine: Machine) -> str:
    """Say in a paragraph where and when the figures below it were taken."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    load = ", ".join(f"{value:g}" for value in machine.load_average)
    return (
        f"{machine.date[:10]}, commit `{machine.commit}`; {machine.cores} cores ({machine.cpu}), "
        f"{machine.memory_gib:g} GiB, Linux {machine.kernel}, load average before it {load}; {versions}.\n"
    )


COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759")


def stacked_bars(title: str, unit: str, bars: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Draw horizontal bars as SVG: each has a label and parts, by name; a name has one colour in all."""
    names = list(dict.fromkeys(name for _, parts in bars for name in parts))
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(names)}
    longest = max(sum(parts.values()) for _, parts in bars) or 1.0
    left, width, row, top = 190, 440, 34, 66
    height = top + row * len(bars) + 12
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="760" height="{height}" fill="#fff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{title}</text>',
    ]
    x = 12.0
    for name in names:
        shapes.append(f'<rect x="{x:g}" y="36" width="12" height="12" fill="{colours[name]}"/>')
        shapes.append(f'<text x="{x + 18:g}" y="47">{name}</text>')
        x += 34 + 8 * len(name)
    for at, (label, parts) in enumerate(bars):
        y = top + row * at
        shapes.append(f'<text x="{left - 10}" y="{y + 16}" text-anchor="end">{label}</text>')
        x = float(left)
        for name, value in parts.items():
            length = value / longest * width
            shapes.append(
                f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="22" fill="{colours[name]}">'
                f"<title>{name}: {value:.1f} {unit}</title></rect>"
            )
            if length > 34:
                shapes.append(
                    f'<text x="{x + length / 2:.1f}" y="{y + 15}" text-anchor="middle" fill="#fff" '
                    f'font-size="11">{value:.1f}</text>'
                )
            x += length
        shapes.append(f'<text x="{x + 8:.1f}" y="{y + 16}">{sum(parts.values()):.1f} {unit}</text>')
    return "\n".join([*shapes, "</svg>", ""])
