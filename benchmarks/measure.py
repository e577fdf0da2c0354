"""Reading other processes' CPU time and memory, and the machine they run on. Linux only."""

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from msgspec import Struct

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Usage(Struct, frozen=True):
    """CPU seconds since the start, and resident bytes now, of one service's processes together."""

    cpu_s: float
    rss_bytes: int


def usage(pids: Iterable[int]) -> Usage:
    """Give what processes have used. One that has gone counts nothing.

    Shared pages count once for each process. CPU time has nanoseconds, where /proc/PID/stat has 10 ms.
    """
    cpu_s, rss_bytes = 0.0, 0
    for pid in pids:
        try:
            # Linux's clock of another process's CPU time; see clock_getcpuclockid(3).
            cpu_s += time.clock_gettime((~pid << 3) | 2)
            rss_bytes += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
        except OSError:
            continue
    return Usage(cpu_s, rss_bytes)


def usages(services: Mapping[str, Sequence[int]]) -> dict[str, Usage]:
    return {name: usage(pids) for name, pids in services.items()}


def with_descendants(pid: int) -> list[int]:
    """Give a process and all that it started."""
    found = [pid]
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in thread.read_text().split():
            found += with_descendants(int(child))
    return found


class Machine(Struct, frozen=True, kw_only=True):
    """Where and when figures were taken; goes with every one of them."""

    date: str
    commit: str
    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    load_average: list[float]
    versions: dict[str, str]


def machine(versions: Mapping[str, str]) -> Machine:
    """Tell where we are. `versions` come on top of Python's own."""
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        cpu=_cpu_name(),
        cores=os.cpu_count() or 0,
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES / 2**30, 1),
        kernel=platform.release(),
        load_average=[round(value, 2) for value in os.getloadavg()],
        versions={"python": platform.python_version(), **versions},
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Give the value that `share` of the sorted `values` do not exceed; 0 where there is none."""
    if not values:
        return 0.0
    return values[min(len(values) - 1, int(len(values) * share))]


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts.get("model name", "") or platform.machine()
