"""Processes as the operating system sees them: which are ours, and who else uses the devices."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

import psutil
from msgspec import Struct

from rbee_contracts.nodes import Device, WorkerProcessInfo
from rbee_hive.supervisor.processes import System


class Owned(Struct, frozen=True, kw_only=True):
    """Whose a process is, whether it is the worker's own, and whether that one lives."""

    worker_id: str
    is_leader: bool
    leader_lives: bool


def find_owned(system: System, leaders: Mapping[str, tuple[str, int]]) -> dict[int, Owned]:
    """Find every process of ours, by the nonce in its environment.

    Args:
        leaders: worker id and pid of the worker's own process, by nonce.
    """
    found: dict[int, tuple[str, int]] = {}
    for pid in system.pids():
        nonce = system.nonce(pid)
        stat = None if nonce is None or nonce not in leaders else system.stat(pid)
        if nonce is not None and stat is not None and not stat.is_ended:
            found[pid] = leaders[nonce]
    return {
        pid: Owned(worker_id=worker_id, is_leader=pid == leader, leader_lives=leader in found)
        for pid, (worker_id, leader) in found.items()
    }


def view(owned: Mapping[int, Owned], devices: Sequence[Device]) -> list[WorkerProcessInfo]:
    """Describe our processes and those on the devices, ours first; those that end meanwhile are left out."""
    pids = [*owned, *(pid for pid in _on_devices(devices) if pid not in owned)]
    described = (_describe(pid, owned.get(pid), devices) for pid in pids)
    return sorted((info for info in described if info is not None), key=_order)


def _on_devices(devices: Iterable[Device]) -> list[int]:
    return sorted({process.pid for device in devices for process in device.processes})


def _order(info: WorkerProcessInfo) -> tuple[bool, str, bool, int]:
    return info.kind == "foreign", info.worker_id or "", info.kind != "worker", info.pid


def _describe(pid: int, owned: Owned | None, devices: Sequence[Device]) -> WorkerProcessInfo | None:
    memory = {
        device.index: process.memory
        for device in devices
        for process in device.processes
        if process.pid == pid
    }
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            started = datetime.fromtimestamp(process.create_time(), UTC).isoformat(timespec="seconds")
            facts = process.ppid(), process.name(), process.username(), process.memory_info().rss
    except psutil.NoSuchProcess:
        # A container may see the driver's list and not the processes in it.
        if owned is not None or not memory:
            return None
        return WorkerProcessInfo(pid=pid, ppid=0, kind="foreign", name="?", devices=memory)
    except psutil.AccessDenied:
        return WorkerProcessInfo(pid=pid, ppid=0, kind="foreign", name="?", devices=memory)
    ppid, name, user, resident = facts
    return WorkerProcessInfo(
        pid=pid,
        ppid=ppid,
        kind=_kind(owned),
        name=name,
        user=user,
        started_at=started,
        memory=resident,
        devices=memory,
        worker_id=None if owned is None else owned.worker_id,
    )


def _kind(owned: Owned | None) -> Literal["worker", "engine", "orphan", "foreign"]:
    if owned is None:
        return "foreign"
    if owned.is_leader:
        return "worker"
    return "engine" if owned.leader_lives else "orphan"
