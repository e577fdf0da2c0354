"""Bytes as people write and read them."""

import re

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip

_size = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*\Z", re.IGNORECASE).match


def parse_bytes(text: str) -> int | None:
    """Read `2 GiB`, `500MB` or `1024`; None where it is none of them.

    A bare `G` is no unit, as it has two meanings.
    """
    match = _size(text)
    if match is None or match[2].lower() not in _UNITS:
        return None
    return int(float(match[1]) * _UNITS[match[2].lower()])


def show_bytes(size: int) -> str:
    """Give a size with one digit behind the point, in GiB, or smaller units below one: `1.5 GiB`."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"
