"""The page about the event log tells the bounds that the code has."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs/architecture/event-log.md"
ROWS = re.findall(r"\| `(\w+)\.([A-Z_]+)` \| (\S+) ?(\S*) \|$", PAGE.read_text(), re.MULTILINE)
UNITS = {"KiB": 2**10, "MiB": 2**20}


@pytest.mark.parametrize(("module", "constant", "value", "unit"), ROWS)
def test_the_table_has_the_values_of_the_constants(module: str, constant: str, value: str, unit: str) -> None:
    bound = getattr(importlib.import_module(f"rbee_job_server.{module}"), constant)

    assert float(value) * UNITS.get(unit, 1) == bound


def test_the_table_is_found() -> None:
    assert len(ROWS) == 13
