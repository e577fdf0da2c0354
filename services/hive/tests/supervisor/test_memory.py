"""A device has its memory back when no ended process is listed there, and what is in use no longer falls."""

import pytest

from rbee_contracts.nodes import Device, DeviceProcess
from rbee_hive.supervisor.memory import SETTLED_BYTES, is_back

GIB = 1 << 30


def gpu(used: int | None, *pids: int, index: int = 0) -> Device:
    processes = [DeviceProcess(pid=pid) for pid in pids]
    return Device(kind="cuda", index=index, name="g", memory_used=used, processes=processes)


CPU = Device(kind="cpu", index=0, name="c", memory_used=5 * GIB)


@pytest.mark.parametrize(
    ("before", "now", "back"),
    [
        ([], [], True),
        ([CPU], [CPU], True),
        ([], [gpu(GIB)], False),
        ([gpu(70 * GIB)], [gpu(GIB)], False),
        ([gpu(GIB)], [gpu(GIB)], True),
        ([gpu(GIB + SETTLED_BYTES)], [gpu(GIB)], True),
        ([gpu(GIB)], [gpu(2 * GIB)], True),
        ([gpu(GIB)], [gpu(GIB, 7)], False),
        ([gpu(GIB)], [gpu(GIB, 8)], True),
        ([gpu(None)], [gpu(None)], True),
        ([gpu(GIB), gpu(9 * GIB, index=1)], [gpu(GIB), gpu(GIB, 7, index=1)], True),
    ],
    ids=[
        *("none", "cpu", "first reading", "falling", "settled", "nearly", "another takes some"),
        *("still listed", "another's", "not told", "other device"),
    ],
)
def test_when_memory_is_back(before: list[Device], now: list[Device], back: bool) -> None:
    assert is_back(before, now, [0], [7]) is back
