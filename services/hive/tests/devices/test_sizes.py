"""Bytes as people write and read them."""

import pytest

from rbee_hive.devices.sizes import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024), ("2 GiB", 2 << 30), ("2gib", 2 << 30), ("1.5 MiB", 3 << 19), ("500MB", 500_000_000),
        ("3 b", 3), ("2 G", None), ("GiB", None), ("-1", None), ("", None), ("1e9", None),
    ],
)  # fmt: skip
def test_reading(text: str, size: int | None) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80 << 30, "80.0 GiB"), (3 << 40, "3.0 TiB")],
)
def test_showing(size: int, text: str) -> None:
    assert show_bytes(size) == text
