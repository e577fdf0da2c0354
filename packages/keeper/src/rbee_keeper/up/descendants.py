"""Everything that runs below this process: found, adopted when its parent dies, ended without a rest."""

import asyncio
import ctypes
import os
import signal
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
REAP_EVERY_S = 1.0
END_POLL_S = 0.05
END_TIMEOUT_S = 10.0


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent dies, so that none gets away."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> set[int]:
    """Give the pids below this process, zombies left out."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_bytes()
            except OSError:
                continue
            state, parent = stat[stat.rindex(b")") + 2 :].split(maxsplit=2)[:2]
            if state not in (b"Z", b"X"):
                children.setdefault(int(parent), []).append(int(entry.name))
    found: set[int] = set()
    todo = [os.getpid()]
    while todo:
        below = [pid for pid in children.get(todo.pop(), ()) if pid not in found]
        found.update(below)
        todo += below
    return found


async def end_descendants(spared: set[int]) -> set[int]:
    """SIGKILL everything below this process but `spared`; give what is still there after that.

    Repeated until a look finds nothing: what starts meanwhile is found by the next look.
    """
    deadline = asyncio.get_running_loop().time() + END_TIMEOUT_S
    while left := descendants() - spared:
        for pid in left:
            _kill(pid)
        reap()
        if asyncio.get_running_loop().time() > deadline:
            return left
        await asyncio.sleep(END_POLL_S)
    return set()


def _kill(pid: int) -> None:
    """SIGKILL a descendant; the pidfd and the second look keep a reused pid safe."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if pid in descendants():
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except OSError:
        return
    finally:
        os.close(fd)


def reap(ours: frozenset[int] = frozenset()) -> None:
    """Take leave of adopted processes that have ended; `ours` are waited for by those who started them."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid in ours:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)
        except ChildProcessError:
            return
