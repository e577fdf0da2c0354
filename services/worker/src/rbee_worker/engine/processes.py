"""The processes that this one has started: found, watched and ended without mistaking one for another."""

import os
import select
import signal
from pathlib import Path

from msgspec import Struct

# Python's own helper of `multiprocessing`; it ends when the process that started it has ended.
_RESOURCE_TRACKER = b"multiprocessing.resource_tracker"


def descendants(root: int | None = None) -> dict[int, int]:
    """Give pid -> parent pid of everything below `root` (default: this process), zombies left out."""
    root = os.getpid() if root is None else root
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            status = _status(int(entry.name))
            if status is not None and status[0] not in "ZX":
                children.setdefault(status[1], []).append(int(entry.name))
    found: dict[int, int] = {}
    todo = [root]
    while todo:
        parent = todo.pop()
        for pid in children.get(parent, ()):
            if pid not in found:
                found[pid] = parent
                todo.append(pid)
    return found


def _status(pid: int) -> tuple[str, int] | None:
    """Give the state letter and the parent of a process, or None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, parent = stat[stat.rindex(b")") + 2 :].split(maxsplit=2)[:2]
    return state.decode(), int(parent)


def _is_resource_tracker(pid: int) -> bool:
    try:
        return _RESOURCE_TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


class _Held(Struct, frozen=True):
    pid: int
    fd: int


class OwnedProcesses:
    """Processes below this one that were not there when it was made, each held by a pidfd.

    A pidfd names one process for ever, so a reused pid is never signalled, and a grandchild whose parent
    has died (and that is no longer below us) is still ended.
    """

    def __init__(self) -> None:
        self._foreign = set(descendants())
        self._held: dict[int, _Held] = {}

    def scan(self) -> None:
        """Take hold of what has been started since."""
        for pid, parent in descendants().items():
            if pid in self._foreign or pid in self._held or _is_resource_tracker(pid):
                continue
            try:
                fd = os.pidfd_open(pid)
            except OSError:
                continue
            status = _status(pid)
            if status is None or status[1] != parent:
                # Gone or another process by now; whoever is really ours is found by the next scan.
                os.close(fd)
                continue
            self._held[pid] = _Held(pid, fd)

    def alive(self) -> list[int]:
        """Give the pids of those held that have not ended."""
        return [held.pid for held in self._held.values() if not _has_ended(held.fd)]

    def kill(self) -> list[int]:
        """SIGKILL all of them; returns the pids that were still alive. Call again until it returns none."""
        self.scan()
        alive = self.alive()
        for pid in alive:
            try:
                signal.pidfd_send_signal(self._held[pid].fd, signal.SIGKILL)
            except OSError:
                continue
        return alive

    def close(self) -> None:
        """Let go of all of them."""
        for held in self._held.values():
            os.close(held.fd)
        self._held.clear()


def _has_ended(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
