"""When a device has a worker's memory back: the driver gives it back some time after the process's end."""

from collections.abc import Collection, Sequence

from rbee_contracts.nodes import Device

SETTLED_BYTES = 64 * 2**20
"""Memory in use that changes by less between two readings counts as the same."""


def is_back(
    before: Sequence[Device], now: Sequence[Device], devices: Collection[int], pids: Collection[int]
) -> bool:
    """Whether the memory of ended processes is back on some CUDA devices.

    It is when the driver lists none of `pids` on them any more, and what is in use no longer falls. Pids may
    not compare (containers have their own), so both are asked.

    Args:
        before: the reading before.
        now: the newest reading.
    """
    earlier = {device.index: device for device in before if device.kind == "cuda"}
    for device in now:
        if device.kind != "cuda" or device.index not in devices:
            continue
        if any(process.pid in pids for process in device.processes):
            return False
        used, was = device.memory_used, earlier[device.index].memory_used if device.index in earlier else None
        if used is not None and (was is None or was - used > SETTLED_BYTES):
            return False
    return True
