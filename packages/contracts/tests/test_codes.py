"""The table of codes has every code that the services know, so that none of them is `other` in a metric."""

import ast
from collections.abc import Iterator
from pathlib import Path

from rbee_contracts.codes import CODES

ROOT = Path(__file__).resolve().parents[3]
NAMES = {"default_code", "NO_DEVICE_MEMORY"}


def codes_in(path: Path) -> Iterator[str]:
    """Every text that stands for a code in a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        value: ast.expr | None = None
        match node:
            case ast.keyword(arg="code"):
                value = node.value
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                value = node.value if name in NAMES else None
        if value is not None:
            texts = (each.value for each in ast.walk(value) if isinstance(each, ast.Constant))
            yield from (text for text in texts if isinstance(text, str))


def test_every_code_in_the_source_is_in_the_table_and_no_other() -> None:
    sources = [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("services/*/src/**/*.py")]
    found = {code for path in sources if "rbee_keeper" not in path.parts for code in codes_in(path)}
    ends = {"cancelled", "not_read", "abandoned", "owner_gone"}
    of_http = {"http_error", "method_not_allowed", "route_not_found"}

    assert found | ends | of_http == CODES
