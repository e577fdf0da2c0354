"""Write docs/reference/job-operations.md from the contracts, so that the page cannot tell anything else.

`python scripts/reference.py` writes it; with `--check` it only tells whether it is up to date.
"""

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import msgspec.inspect as mi

from rbee_contracts.events import EVENTS, Event
from rbee_contracts.operations import OPERATIONS, HiveOperation, Infer, LogSearch, OnHive, OpenAI, Operation
from rbee_contracts.results import RESULTS

PAGE = Path(__file__).resolve().parents[1] / "docs/reference/job-operations.md"

_HEAD = """# Job operations

<!-- Written by scripts/reference.py from the contracts; do not edit. -->

Every operation is the body of a `POST /v1/jobs`, told apart by `operation`. This page lists them with
their fields, bounds and results, and then every event. How jobs and streams work is told in
[the job-based pattern](../architecture/job-based-pattern.md).

An operation that this version knows but cannot execute yet is answered with 501 `not_implemented`. Every
operation takes `timeout_s`, the seconds it may run before it ends with `execute_timeout`. A field that an
operation does not have is ignored, and named in a `warning` event.
"""

_WHERE = {
    "queen": "Executed by the queen.",
    "hive": "Executed by a hive: send it there, or to the queen with `hive_id` "
    "(which may be left out while there is one hive).",
    "both": "Executed by the queen, who asks the hives, and by each hive.",
    "all": "Taken by the queen, a hive and a worker alike.",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    page = "\n".join(_page()) + "\n"
    if parser.parse_args(argv).check:
        return 0 if PAGE.exists() and PAGE.read_text() == page else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page)
    return 0


def _page() -> Iterator[str]:
    yield _HEAD
    yield "## Operations"
    for operation in OPERATIONS.values():
        yield from _operation(operation)
    yield "\n## Events\n"
    yield "| action | kind | what it says | `data` |"
    yield "| --- | --- | --- | --- |"
    for action, event in EVENTS.items():
        yield f"| `{action}` | {event.kind} | {_cell(_doc(event))} | {_event_data(event)} |"
    yield from _shapes()


def _operation(operation: type[Operation]) -> Iterator[str]:
    yield f"\n### {operation.__struct_config__.tag}\n"
    yield f"{_doc(operation)}\n"
    yield f"{_where(operation)}\n"
    told_elsewhere = {"timeout_s"} | ({"hive_id"} if issubclass(operation, HiveOperation) else set())
    fields = [field for field in _struct(operation).fields if field.name not in told_elsewhere]
    if fields:
        yield "| field | type | default |"
        yield "| --- | --- | --- |"
        for field in fields:
            yield f"| `{field.name}` | {_cell(_type(field.type))} | {_default(field)} |"
        yield ""
    result = RESULTS.get(operation)
    yield (
        f"Result: {_link(result.__name__)}."
        if result
        else "No service executes it in this version: 501 `not_implemented`."
    )


def _where(operation: type[Operation]) -> str:
    if operation is LogSearch:
        return _WHERE["both"]
    if operation in (Infer, OpenAI):
        return _WHERE["all"]
    if issubclass(operation, HiveOperation) and operation in get_args(OnHive):
        return _WHERE["hive"]
    return _WHERE["queen"]


def _shapes() -> Iterator[str]:
    """Describe every struct that a result or an event's data is made of."""
    found: dict[str, mi.StructType] = {}
    for root in [*RESULTS.values(), *EVENTS.values()]:
        for field in _struct(root).fields:
            _collect(field.type, found)
        if not issubclass(root, Event):
            found[root.__name__] = _struct(root)
    yield "\n## Shapes"
    for name, struct in sorted(found.items()):
        yield f"\n### {name}\n"
        if doc := _doc(struct.cls):
            yield f"{doc}\n"
        yield "| field | type |"
        yield "| --- | --- |"
        for field in struct.fields:
            optional = "" if field.required else ", may be missing"
            yield f"| `{field.name}` | {_cell(_type(field.type))}{optional} |"


def _collect(type_: mi.Type, found: dict[str, mi.StructType]) -> None:
    match type_:
        case mi.StructType():
            if type_.cls.__name__ not in found:
                found[type_.cls.__name__] = type_
                for field in type_.fields:
                    _collect(field.type, found)
        case mi.UnionType(types=types):
            for part in types:
                _collect(part, found)
        case mi.ListType(item_type=item):
            _collect(item, found)
        case mi.Metadata(type=inner):
            _collect(inner, found)


def _struct(cls: type[Any]) -> mi.StructType:
    struct = mi.type_info(cls)
    assert isinstance(struct, mi.StructType)
    return struct


def _event_data(event: type[Event]) -> str:
    data = next((field.type for field in _struct(event).fields if field.name == "data"), None)
    return _cell(_type(data)) if data is not None else ""


def _type(type_: mi.Type) -> str:
    match type_:
        case mi.Metadata(type=inner, extra_json_schema=extra):
            description = (extra or {}).get("description")
            return (
                f"text: {description[0].lower()}{description[1:].rstrip('.')}"
                if description
                else _type(inner)
            )
        case mi.StrType():
            return "text" + _bounds(type_.min_length, type_.max_length, " characters")
        case mi.IntType():
            return "integer" + _bounds(_low(type_), _high(type_))
        case mi.FloatType():
            return "number" + _bounds(_low(type_), _high(type_))
        case mi.BoolType():
            return "true or false"
        case mi.NoneType():
            return "null"
        case mi.LiteralType(values=values):
            return " or ".join(f"`{value}`" for value in values)
        case mi.ListType(item_type=item):
            return f"list of {_type(item)}" + _bounds(type_.min_length, type_.max_length, " items")
        case mi.DictType():
            return "object"
        case mi.StructType(cls=cls):
            return _link(cls.__name__)
        case mi.UnionType(types=types):
            return ", or ".join(_type(part) for part in types if not isinstance(part, mi.NoneType))
        case _:
            return "any value"


def _low(type_: mi.IntType | mi.FloatType) -> str | None:
    if type_.ge is not None:
        return f"{type_.ge:,}"
    return None if type_.gt is None else f"more than {type_.gt:,}"


def _high(type_: mi.IntType | mi.FloatType) -> str | None:
    if type_.le is not None:
        return f"{type_.le:,}"
    return None if type_.lt is None else f"less than {type_.lt:,}"


def _bounds(low: Any, high: Any, unit: str = "") -> str:
    low, high = (f"{b:,}" if isinstance(b, int) else b for b in (low, high))
    if low is None and high is None:
        return ""
    if high is None:
        return f" (at least {low}{unit})"
    return f" (at most {high}{unit})" if low is None else f" ({low} to {high}{unit})"


def _default(field: mi.Field) -> str:
    if field.required:
        return "needed"
    if field.default is None or field.default is msgspec.NODEFAULT:
        return ""
    return f"`{msgspec.json.encode(field.default).decode()}`"


def _doc(cls: type[Any]) -> str:
    """Give a struct's own docstring; an inherited one describes something else."""
    return inspect.cleandoc(cls.__dict__.get("__doc__") or "")


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
