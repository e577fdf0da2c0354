"""No signal ever goes to a process that is not proven ours, whatever happens to pids and sessions."""

import signal
import threading
from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rbee_hive.supervisor.processes import Family, ProcessStat

NONCE = "ours"
PIDS = range(2, 12)


class Process:
    """A process of the fake system. `is_ours` is the truth that the family cannot see."""

    def __init__(
        self, pid: int, ppid: int, session: int, start: int, nonce: str | None, *, ours: bool
    ) -> None:
        self.stat = ProcessStat(pid=pid, ppid=ppid, session=session, start_ticks=start)
        self.nonce = nonce
        self.is_ours = ours
        self.is_alive = True


class FakeSystem:
    """Processes with few pids, which are reused at once. `between` runs between any two calls."""

    def __init__(self) -> None:
        self.processes: dict[int, Process] = {}
        self.handles: dict[int, Process] = {}
        self.signalled: list[tuple[Process, signal.Signals]] = []
        self.start = 0
        self.surprises: list[int] = []

    def _happen(self) -> None:
        """A process ends, and its pid is somebody else's at once."""
        if self.surprises:
            pid = self.surprises.pop()
            self.end(pid)
            if not self.is_session(pid):
                self.add(pid, 1, pid, None, ours=False)

    def is_session(self, pid: int) -> bool:
        """Whether a pid is in use as a session's id: the kernel gives it to nobody else."""
        return any(p.is_alive and p.stat.session == pid for p in self.processes.values())

    def add(self, pid: int, ppid: int, session: int, nonce: str | None, *, ours: bool) -> Process:
        self.start += 1
        self.processes[pid] = Process(pid, ppid, session, self.start, nonce, ours=ours)
        return self.processes[pid]

    def end(self, pid: int) -> None:
        process = self.processes.pop(pid, None)
        if process is not None:
            process.is_alive = False

    def pids(self) -> Iterable[int]:
        return list(self.processes)

    def stat(self, pid: int) -> ProcessStat | None:
        self._happen()
        process = self.processes.get(pid)
        return None if process is None else process.stat

    def nonce(self, pid: int) -> str | None:
        self._happen()
        process = self.processes.get(pid)
        return None if process is None else process.nonce

    def open(self, pid: int) -> int | None:
        self._happen()
        process = self.processes.get(pid)
        if process is None:
            return None
        handle = len(self.handles)
        self.handles[handle] = process
        return handle

    def has_ended(self, handle: int) -> bool:
        return not self.handles[handle].is_alive

    def send(self, handle: int, signum: signal.Signals) -> None:
        process = self.handles[handle]
        if not process.is_alive:
            return
        self.signalled.append((process, signum))
        if signum == signal.SIGKILL:
            self.end(process.stat.pid)

    def close(self, handle: int) -> None: ...


class Signals(RuleBasedStateMachine):
    """One family among processes that come and go; the pids are few, so that they are reused."""

    @initialize(led=st.booleans(), right=st.booleans())
    def begin(self, led: bool, right: bool) -> None:
        self.system = FakeSystem()
        self.family = Family(self.system, NONCE)
        leader = self.system.add(2, 1, 2, NONCE, ours=True)
        if led:
            start = leader.stat.start_ticks if right else leader.stat.start_ticks + 7
            assert self.family.lead(2, start) is right

    @rule(pid=st.sampled_from(PIDS), own_session=st.booleans())
    def ours_starts_another(self, pid: int, own_session: bool) -> None:
        parents = [p for p in self.system.processes.values() if p.is_ours]
        if parents and pid not in self.system.processes and not self.system.is_session(pid):
            parent = parents[0]
            session = pid if own_session else parent.stat.session
            self.system.add(pid, parent.stat.pid, session, NONCE, ours=True)

    @rule(pid=st.sampled_from(PIDS), nonce=st.sampled_from([None, "theirs"]))
    def a_stranger_comes(self, pid: int, nonce: str | None) -> None:
        if pid not in self.system.processes and not self.system.is_session(pid):
            self.system.add(pid, 1, pid, nonce, ours=False)

    @rule(pid=st.sampled_from(PIDS))
    def one_ends(self, pid: int) -> None:
        self.system.end(pid)

    @rule(pids=st.lists(st.sampled_from(PIDS), max_size=4))
    def some_will_end_at_a_bad_moment(self, pids: list[int]) -> None:
        self.system.surprises = list(pids)

    @rule()
    def scan(self) -> None:
        self.family.scan()

    @rule()
    def kill(self) -> None:
        self.family.kill()

    @rule()
    def terminate(self) -> None:
        self.family.terminate()

    @invariant()
    def only_ours_are_signalled(self) -> None:
        if hasattr(self, "system"):
            assert all(process.is_ours for process, _ in self.system.signalled)

    @rule()
    def ending_it_ends_all_of_it(self) -> None:
        self.system.surprises = []
        while self.family.kill():
            pass
        assert not any(p.is_ours for p in self.system.processes.values())


Signals.TestCase.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
TestSignals = Signals.TestCase


def test_a_session_that_is_led_by_ours_is_ours_without_a_nonce() -> None:
    """A process may write over its environment."""
    system = FakeSystem()
    leader = system.add(2, 1, 2, NONCE, ours=True)
    system.add(3, 2, 2, None, ours=True)
    system.add(4, 1, 4, None, ours=False)
    family = Family(system, NONCE)
    assert family.lead(2, leader.stat.start_ticks)
    family.scan()

    assert [stat.pid for stat in family.alive()] == [2, 3]
    family.close()
    assert family.alive() == []


def test_after_its_leader_a_session_proves_nothing() -> None:
    system = FakeSystem()
    leader = system.add(2, 1, 2, NONCE, ours=True)
    family = Family(system, NONCE)
    assert family.lead(2, leader.stat.start_ticks)
    system.end(2)
    system.add(5, 1, 2, None, ours=False)

    assert family.kill() == 0
    assert system.signalled == []


class FamilyClosedMeanwhile(FakeSystem):
    """Lets another thread close the family as soon as it may, once it was looked who lives."""

    def __init__(self) -> None:
        super().__init__()
        self.family: Family | None = None
        self.closer: threading.Thread | None = None
        self.closed: set[int] = set()
        self.sent_to_closed: list[int] = []

    def has_ended(self, handle: int) -> bool:
        if self.family is not None and self.closer is None and self.family._turn.locked():
            self.closer = threading.Thread(target=self.family.close)
            self.closer.start()
        return super().has_ended(handle)

    def send(self, handle: int, signum: signal.Signals) -> None:
        assert self.closer is not None
        self.closer.join(0.5)
        if handle in self.closed:
            self.sent_to_closed.append(handle)

    def close(self, handle: int) -> None:
        self.closed.add(handle)


def test_a_family_that_is_closed_meanwhile_signals_nobody() -> None:
    """The number of a descriptor that was closed is the next one's: it may hold a stranger by then."""
    system = FamilyClosedMeanwhile()
    leader = system.add(2, 1, 2, NONCE, ours=True)
    family = Family(system, NONCE)
    assert family.lead(2, leader.stat.start_ticks)
    system.family = family

    family.kill()
    assert system.closer is not None
    system.closer.join()

    assert system.sent_to_closed == []
    assert len(system.closed) == 1
