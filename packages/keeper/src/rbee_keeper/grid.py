"""A table before it is drawn, and which of its columns a narrow terminal shows; pure."""

from collections.abc import Callable
from itertools import compress

import msgspec
from msgspec import Struct

GAP = 2
"""Spaces between two columns."""

ELASTIC_WIDTH = 22
"""So narrow an elastic column may get."""


class Grid(Struct, frozen=True, kw_only=True):
    """A table, however it is going to be shown.

    Args:
        dispensable: columns that a narrow terminal leaves out, the first one first.
        elastic: columns of prose, which may be broken over lines down to `ELASTIC_WIDTH`; others never are.
        to_the_right: columns of numbers.
        empty: what is said where there are no rows.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    empty: str
    dispensable: tuple[str, ...] = ()
    elastic: tuple[str, ...] = ()
    to_the_right: tuple[str, ...] = ()


def least_width(grid: Grid, measure: Callable[[str], int] = len) -> int:
    """Give the width that a table takes at least, when only its elastic columns are broken over lines."""
    widths = {column[0]: max(map(measure, column)) for column in zip(grid.columns, *grid.rows, strict=True)}
    narrowed = (min(widths[name], ELASTIC_WIDTH) if name in grid.elastic else widths[name] for name in widths)
    return sum(narrowed) + GAP * (len(grid.columns) - 1)


def without(grid: Grid, column: str) -> Grid:
    """Give the table without one of its columns."""
    kept = [name != column for name in grid.columns]
    return msgspec.structs.replace(
        grid,
        columns=tuple(compress(grid.columns, kept)),
        rows=[tuple(compress(row, kept)) for row in grid.rows],
    )


def without_empty(grid: Grid) -> Grid:
    """Give the table without those dispensable columns in which no row has anything."""
    for index, column in reversed(list(enumerate(grid.columns))):
        if column in grid.dispensable and all(row[index] == "-" for row in grid.rows):
            grid = without(grid, column)
    return grid


def fit(grid: Grid, width: int, measure: Callable[[str], int] = len) -> tuple[Grid, list[str]]:
    """Leave out dispensable columns until the table fits; give it, and the columns that are left out."""
    left_out = []
    for column in grid.dispensable:
        if least_width(grid, measure) <= width:
            break
        if column in grid.columns:
            grid = without(grid, column)
            left_out.append(column)
    return grid, left_out
