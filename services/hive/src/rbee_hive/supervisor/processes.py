"""Which processes are ours, and signals to those only.

A process is ours when its environment holds the nonce of one of our workers, or when it is of the session
of a worker's living process that is proven. Each is then held by a pidfd, which names one process for ever:
a pid that is reused is somebody else, and is never signalled.
"""

import os
import select
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from rbee_contracts.access import NONCE_VARIABLE

_ENTRY = f"{NONCE_VARIABLE}=".encode()


class ProcessStat(Struct, frozen=True, kw_only=True):
    """What tells one process from another: the same pid with another start is another process.

    `start_ticks` counts clock ticks since the machine's boot. `state` is the letter of /proc.
    """

    pid: int
    ppid: int
    session: int
    start_ticks: int
    state: str = "S"

    @property
    def is_ended(self) -> bool:
        """Whether it has ended and only waits to be reaped."""
        return self.state in "ZX"


class System(Protocol):
    """The operating system's processes."""

    def pids(self) -> Iterable[int]:
        """Give the pids of all processes."""

    def stat(self, pid: int) -> ProcessStat | None:
        """Tell of a process; None where there is none."""

    def nonce(self, pid: int) -> str | None:
        """Give the nonce in a process's environment; None where there is none, or it is another user's."""

    def open(self, pid: int) -> int | None:
        """Take hold of the process that has `pid` now; None where there is none."""

    def has_ended(self, handle: int) -> bool: ...

    def send(self, handle: int, signum: signal.Signals) -> None:
        """Signal a held process; one that has ended gets none."""

    def close(self, handle: int) -> None: ...


class LinuxSystem:
    """`System` by /proc and pidfds."""

    def pids(self) -> list[int]:
        return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]

    def stat(self, pid: int) -> ProcessStat | None:
        try:
            text = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        fields = text[text.rindex(b")") + 2 :].split()
        return ProcessStat(
            pid=pid,
            state=fields[0].decode(),
            ppid=int(fields[1]),
            session=int(fields[3]),
            start_ticks=int(fields[19]),
        )

    def nonce(self, pid: int) -> str | None:
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return None
        found = next((entry for entry in environ.split(b"\0") if entry.startswith(_ENTRY)), None)
        return None if found is None else found[len(_ENTRY) :].decode(errors="replace")

    def open(self, pid: int) -> int | None:
        try:
            return os.pidfd_open(pid)
        except OSError:
            return None

    def has_ended(self, handle: int) -> bool:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, handle: int, signum: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(handle, signum)

    def close(self, handle: int) -> None:
        os.close(handle)


def boot_id() -> str:
    """Give the id of the machine's boot: process start times compare only within one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class Held(Struct, frozen=True):
    """A process that was proven ours, held by a pidfd."""

    stat: ProcessStat
    handle: int


class Family:
    """The processes of one worker: its own and all below it, each proven and held.

    May be used from several threads; looking through all processes takes a while on a large machine.

    Args:
        nonce: what the worker's environment holds.
    """

    def __init__(self, system: System, nonce: str) -> None:
        self._system = system
        self._nonce = nonce
        self._held: dict[int, Held] = {}
        self._retired: list[Held] = []
        self._leader: Held | None = None
        self._turn = threading.Lock()
        self._is_closed = False

    @property
    def leader(self) -> Held | None:
        """The worker's own process, once it was led in."""
        return self._leader

    def lead(self, pid: int, start_ticks: int | None = None) -> bool:
        """Take hold of the worker's own process; False where `pid` is not proven to be it.

        Args:
            start_ticks: when it was started, by its record; None for a child that was started just now and
                not waited for, whose pid cannot be anybody else's.
        """
        with self._turn:
            held = self._take(pid, is_child=start_ticks is None)
            if held is None:
                return False
            if start_ticks is not None and held.stat.start_ticks != start_ticks:
                del self._held[pid]
                self._system.close(held.handle)
                return False
            self._leader = held
            return True

    def scan(self) -> None:
        """Take hold of what has been started since, wherever it is below init."""
        for pid in self._system.pids():
            if self._is_held(pid):
                continue
            stat = self._system.stat(pid)
            if stat is None or stat.is_ended:
                continue
            session = self._led_session()
            in_session = session is not None and stat.session == session
            if in_session or self._system.nonce(pid) == self._nonce:
                with self._turn:
                    self._take(pid, of_session=session if in_session else None)

    def _led_session(self) -> int | None:
        """Give the session that is proven ours: that of the worker's own process, while it lives."""
        leader = self._leader
        if leader is None or self._system.has_ended(leader.handle):
            return None
        return leader.stat.pid

    def _is_held(self, pid: int) -> bool:
        held = self._held.get(pid)
        return held is not None and not self._system.has_ended(held.handle)

    def _take(self, pid: int, *, is_child: bool = False, of_session: int | None = None) -> Held | None:
        """Hold `pid`, then prove it: what is proven while the held process lives is true of that one."""
        if self._is_held(pid):
            return self._held[pid]
        if self._is_closed:  # by another thread, while this one looked around
            return None
        handle = self._system.open(pid)
        if handle is None:
            return None
        stat = self._system.stat(pid)
        is_ours = stat is not None and (
            is_child
            or self._system.nonce(pid) == self._nonce
            or (of_session is not None and stat.session == of_session == self._led_session())
        )
        # A child may have ended already: nobody else gets its pid before it is waited for.
        if stat is None or not is_ours or (not is_child and self._system.has_ended(handle)):
            self._system.close(handle)
            return None
        before = self._held.get(pid)
        if before is not None:  # a pid that one of ours had is used again, by one of ours
            self._retired.append(before)
        held = Held(stat, handle)
        self._held[pid] = held
        return held

    def _alive(self) -> list[Held]:
        """Give those that live. What is done with their handles is done under the same lock: a number that
        another thread has closed may hold somebody else by then."""
        return [held for held in self._held.values() if not self._system.has_ended(held.handle)]

    def pids(self) -> list[int]:
        """Give the pids of all that were ever held."""
        with self._turn:
            return list(self._held)

    def alive(self) -> list[ProcessStat]:
        """Give those held that have not ended, the worker's own first."""
        with self._turn:
            return [held.stat for held in self._alive()]

    def terminate(self) -> None:
        """SIGTERM to the worker's own process."""
        with self._turn:
            if self._leader is not None:
                self._system.send(self._leader.handle, signal.SIGTERM)

    def send(self, pid: int, signum: signal.Signals) -> bool:
        """Signal one of those held; False where `pid` is none of them, or has ended."""
        with self._turn:
            held = next((held for held in self._alive() if held.stat.pid == pid), None)
            if held is not None:
                self._system.send(held.handle, signum)
            return held is not None

    def kill(self) -> int:
        """SIGKILL to all that is ours; gives how many were alive. Call again until it gives 0."""
        self.scan()
        with self._turn:
            alive = self._alive()
            for held in alive:
                self._system.send(held.handle, signal.SIGKILL)
            return len(alive)

    def close(self) -> None:
        """Let go of all of them."""
        with self._turn:
            for held in (*self._held.values(), *self._retired):
                self._system.close(held.handle)
            self._is_closed = True
            self._held.clear()
            self._retired.clear()
            self._leader = None
