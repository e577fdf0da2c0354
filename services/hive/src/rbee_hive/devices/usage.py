"""What processes really use of a device's memory."""

from collections.abc import Collection, Iterable, Sequence

import psutil

from rbee_contracts.nodes import Device


def worker_memory(pids: Collection[int], devices: Sequence[Device], indexes: Iterable[int]) -> int | None:
    """Give what a worker's processes use of GPU memory, in bytes, on that of its devices where it is most.

    Args:
        pids: of the worker and all its children.
        devices: as `Devices.read` gave them.
        indexes: of the worker's GPUs.

    Returns:
        None where the driver does not tell (in a container with its own process ids, for example).
    """
    wanted = set(indexes)
    told: list[int] = []
    for device in devices:
        if device.kind != "cuda" or device.index not in wanted:
            continue
        uses = [process.memory for process in device.processes if process.pid in pids]
        if not uses or any(use is None for use in uses):
            return None
        told.append(sum(use for use in uses if use is not None))
    return max(told, default=None)


def resident_memory(pids: Collection[int]) -> int | None:
    """Give what processes have in RAM, in bytes; None when none of them is there any more.

    Pages that several of them share count for each.
    """
    sizes = [size for pid in pids if (size := _resident(pid)) is not None]
    return sum(sizes) if sizes else None


def foreign_memory(device: Device, ours: Collection[int], reserved: int = 0) -> int:
    """Give what of a GPU is in use and not by `ours`, in bytes: other programs, and the driver itself.

    Args:
        ours: the process ids of this hive's workers.
        reserved: promised to them. Where the driver does not tell whose memory it is (in a container, which
            has its own process ids), as much counts as theirs.
    """
    known = [process.memory for process in device.processes if process.pid in ours]
    sizes = [size for size in known if size is not None]
    if device.memory_used is None:
        return sum(process.memory or 0 for process in device.processes if process.pid not in ours)
    is_told = bool(sizes) and len(sizes) == len(known)
    return max(0, device.memory_used - (sum(sizes) if is_told else reserved))


def _resident(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None
