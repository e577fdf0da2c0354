"""Amounts, bars, tables and safe text: what is computed before anything is printed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_keeper import units
from rbee_keeper.grid import GAP, Grid, fit, least_width, without_empty
from rbee_keeper.text import one_line, printable, printable_json

WORDS = st.text("ab ", max_size=30)


@pytest.mark.parametrize(
    ("used", "promised", "whole", "drawn"),
    [
        (0, 0, 100, ".........."),
        (1, 0, 100, "#........."),
        (99, 0, 100, "#########."),
        (100, 0, 100, "##########"),
        (25, 75, 100, "##======.."),
        (75, 25, 100, "########.."),
        (50, 200, 100, "#####====="),
        (10, 0, 0, ".........."),
        (-5, 0, 100, ".........."),
    ],
)
def test_bars(used: float, promised: float, whole: float, drawn: str) -> None:
    assert drawn == units.bar(used, promised, whole, 10, is_unicode=False)


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12), st.floats(-1, 1e12), st.integers(1, 200))
def test_a_bar_is_as_long_as_asked(used: float, promised: float, whole: float, width: int) -> None:
    assert width == len(units.bar(used, promised, whole, width))


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "-:--"), (0, "0:00"), (59.9, "0:59"), (61, "1:01"), (36_061, "10:01:01")]
)
def test_times_to_go(seconds: float | None, shown: str) -> None:
    assert shown == units.clock(seconds)


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [(1, None, "-"), (0, 0, "-"), (999, 1000, "99%"), (7, 7, "100%"), (9, 7, "100%")],
)
def test_a_share_is_whole_only_at_the_end(part: float, whole: float | None, shown: str) -> None:
    assert shown == units.share(part, whole)


@pytest.mark.parametrize(
    ("count", "shown"), [(None, "-"), (0, "0 MiB"), (2**29, "512 MiB"), (3 * 2**29, "1.5 GiB")]
)
def test_memory(count: int | None, shown: str) -> None:
    assert shown == units.memory(count)


def test_a_size_is_never_a_thousand_of_a_unit() -> None:
    assert [units.size(999_999), units.size(999_000)] == ["1 MB", "999 kB"]


# --- tables ----------------------------------------------------------------------------------------------


def table(*rows: tuple[str, ...], **options: tuple[str, ...]) -> Grid:
    return Grid(title="T", columns=("name", "prose", "extra"), rows=list(rows), empty="", **options)


def test_dispensable_columns_go_in_their_order_until_it_fits() -> None:
    grid = table(("n" * 10, "p" * 10, "e" * 10), dispensable=("extra", "prose"))

    assert (grid, []) == fit(grid, 30 + 2 * GAP)
    assert fit(grid, 20 + GAP)[1] == ["extra"]
    assert fit(grid, 5)[1] == ["extra", "prose"]
    assert fit(grid, 5)[0].columns == ("name",)


def test_prose_is_broken_over_lines_before_a_column_goes() -> None:
    grid = table(("n", "p" * 100, "e"), dispensable=("extra",), elastic=("prose",))

    assert fit(grid, 40)[1] == []


def test_a_dispensable_column_with_nothing_in_it_is_not_drawn() -> None:
    grid = table(("n", "-", "-"), ("m", "-", "x"), dispensable=("prose", "extra"))

    assert without_empty(grid).columns == ("name", "extra")
    assert without_empty(grid).rows == [("n", "-"), ("m", "x")]


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5), st.integers(1, 120))
def test_what_remains_fits_or_cannot_be_made_to(rows: list[tuple[str, ...]], width: int) -> None:
    grid = table(*rows, dispensable=("extra",))

    fitted, left_out = fit(grid, width)

    assert least_width(fitted) <= width or left_out == ["extra"]
    assert set(fitted.columns) | set(left_out) == set(grid.columns)


# --- text ------------------------------------------------------------------------------------------------


@given(st.text())
def test_one_line_is_one_line_without_control(text: str) -> None:
    line = one_line(text)

    assert line.splitlines() in ([], [line])
    assert line == printable(line)
    assert not set(line) & set("\u202e\u2066\u200f\n\t")


@given(st.text())
def test_json_for_a_terminal_means_the_same(text: str) -> None:
    import json

    document = json.dumps({"a": text}, ensure_ascii=False)

    assert json.loads(document) == json.loads(printable_json(document))
    assert not any(0x7F <= ord(character) < 0xA0 for character in printable_json(document))
