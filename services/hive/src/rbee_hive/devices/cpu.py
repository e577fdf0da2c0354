"""The CPU and the RAM that this process may use, which a control group may make less than the machine's."""

import os
import platform
from pathlib import Path
from typing import NamedTuple

import psutil

from rbee_contracts.nodes import Device

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")


class Ram(NamedTuple):
    """Bytes that may be used, and bytes of them that are."""

    total: int
    used: int


def read_cpu() -> Device:
    """Give the CPU as a device. Its utilisation is the whole machine's since the last call."""
    ram = read_ram()
    return Device(
        kind="cpu",
        index=0,
        name=_name(),
        memory_total=ram.total,
        memory_used=ram.used,
        utilization=psutil.cpu_percent(),
        cores=len(os.sched_getaffinity(0)),
    )


def read_ram(cgroup_root: Path = CGROUP_ROOT, proc: Path = PROC) -> Ram:
    """Give the RAM: of the control group where that is bounded below the machine's, else the machine's."""
    memory = psutil.virtual_memory()
    machine = Ram(memory.total, memory.total - memory.available)
    limited = cgroup_ram(cgroup_root, proc)
    if limited is None or limited.total >= machine.total:
        return machine
    # The machine may have less left than the group may take.
    return Ram(limited.total, max(limited.used, limited.total - memory.available))


def cgroup_ram(cgroup_root: Path = CGROUP_ROOT, proc: Path = PROC) -> Ram | None:
    """Give the tightest limit of this process's control group and those above it; None without one.

    What can be given back at once (inactive file cache) does not count as used.
    """
    found: list[Ram] = []
    for line in _text(proc / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            top = cgroup_root
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = cgroup_root / "memory"
        else:
            continue
        for folder in _folders(top, path):
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and used is not None:
                found.append(Ram(limit, max(0, used - _inactive(folder / "memory.stat", names[2]))))
    return min(found, default=None)


def _folders(top: Path, path: str) -> list[Path]:
    """Give the group's folder and those above it. In a container its own path may not be there."""
    folder = top / path.strip("/")
    inner = [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    return [each for each in inner if each.is_dir()]


def _inactive(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _name() -> str:
    for line in _text(PROC / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()
