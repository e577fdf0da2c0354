"""Write the tables of docs/operations/metrics.md from the code, so that the page cannot tell anything else.

`python scripts/metrics_reference.py` writes them; with `--check` it only tells whether they are up to date.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rbee_hive.metrics import HIVE_METRICS
from rbee_job_server.metrics import (
    FIREHOSE_METRICS,
    JOB_METRICS,
    RELAY_METRICS,
    REQUEST_METRICS,
    SERVICE_METRICS,
    Metric,
)
from rbee_queen.metrics.collector import QUEEN_METRICS

PAGE = Path(__file__).resolve().parents[1] / "docs/operations/metrics.md"

TABLES: dict[str, Sequence[Metric]] = {
    "service": SERVICE_METRICS,
    "requests": REQUEST_METRICS,
    "jobs": JOB_METRICS,
    "firehose": FIREHOSE_METRICS,
    "relay": RELAY_METRICS,
    "queen": QUEEN_METRICS,
    "hive": HIVE_METRICS,
}

_table = re.compile(r"(<!-- metrics: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    text = PAGE.read_text()
    wanted = _table.sub(lambda found: found[1] + table(TABLES[found[2]]) + found[3], text)
    if {found[2] for found in _table.finditer(text)} != set(TABLES):
        print(f"{PAGE.name} must have a table each for {', '.join(TABLES)}", file=sys.stderr)
        return 1
    if parser.parse_args(argv).check:
        return 0 if text == wanted else 1
    PAGE.write_text(wanted)
    return 0


def table(metrics: Sequence[Metric]) -> str:
    """Write one table."""
    rows = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
