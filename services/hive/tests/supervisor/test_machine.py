"""The state machine of one worker: what each event means, by tables, and what always holds, by hypothesis."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rbee_hive.supervisor.machine import (
    Answered,
    Clear,
    Cleared,
    DrainAsked,
    Effect,
    Ending,
    Event,
    Exited,
    Kill,
    Launch,
    Launched,
    LaunchFailed,
    Life,
    Missed,
    Policy,
    Probe,
    Probed,
    Release,
    StopAsked,
    TellFailed,
    TellReady,
    Terminate,
    Tick,
    WaiterCame,
    WaiterLeft,
    adopted,
    backoff_s,
    begin,
    on,
)

POLICY = Policy()
READY = Answered(is_ready=True)
DIED = Exited(ending=Ending(exit_code=1), cause="exited with status 1")


class Told:
    """A life that events are told to; time moves by `at`."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.policy = policy
        self.now = 100.0
        self.life, self.effects = begin(self.now)

    def tell(self, *events: Event, at: float | None = None) -> list[Effect]:
        self.now = self.now if at is None else at
        self.effects = []
        for event in events:
            self.life, effects = on(self.life, event, self.now, self.policy)
            self.effects += effects
        return self.effects

    def state(self) -> str:
        return self.life.state

    def is_over(self) -> bool:
        return self.life.is_over

    def is_serving(self) -> bool:
        return self.life.is_serving

    def cycle(self) -> None:
        """Die, be cleared, and start again when that is due."""
        self.tell(DIED, Cleared())
        if self.life.start_at is not None:
            self.tell(Tick(), at=self.life.start_at)
            self.tell(Launched())


def ready() -> Told:
    told = Told()
    told.tell(Launched(), WaiterCame(), READY)
    return told


def test_a_start_that_succeeds() -> None:
    told = Told()
    assert told.effects == [Launch()]
    assert told.tell(WaiterCame(), Launched()) == []
    assert told.state() == "starting"
    assert told.tell(Answered(is_ready=False), Missed(), Missed(), Missed(), Missed(), Tick()) == []
    assert told.tell(READY) == [TellReady()]
    assert (told.state(), told.is_serving()) == ("ready", True)
    told.tell(Answered(is_ready=True, active=2))
    assert told.state() == "busy"


def test_a_loading_model_is_not_dead_however_silent_it_is() -> None:
    told = Told()
    told.tell(Launched())
    for second in range(110, 1890, 10):
        assert told.tell(Missed(), Tick(), at=float(second)) == []
    assert told.tell(Tick(), at=1901.0) == [Kill()]
    told.tell(WaiterCame(), Exited(ending=Ending(signal=9), cause="was ended by signal 9"))
    assert told.life.cause == "was not ready 1800 s after its start"


def test_a_first_start_that_fails_fails_all_who_wait_once() -> None:
    told = Told()
    told.tell(Launched(), WaiterCame(), WaiterCame())
    assert told.tell(DIED) == [TellFailed(cause="exited with status 1"), Clear()]
    assert told.state() == "failed"
    assert not told.is_over(), "its children may live"
    assert told.tell(Cleared()) == [Release()]
    assert told.is_over()
    assert told.tell(Tick(), WaiterLeft(), at=9999.0) == []


def test_a_process_that_could_not_be_started_fails_who_wait() -> None:
    told = Told()
    assert told.tell(LaunchFailed(cause="no port")) == [TellFailed(cause="no port"), Release()]
    assert told.is_over()


def test_a_worker_that_was_ready_is_started_again_after_a_wait_that_doubles() -> None:
    told = ready()
    told.tell(DIED, Cleared(), at=200.0)
    assert (told.state(), told.life.start_at, told.life.cause) == (
        "starting",
        201.0,
        "exited with status 1",
    )
    assert told.tell(Tick(), at=200.9) == []
    assert told.tell(Tick(), at=201.0) == [Launch()]
    told.tell(Launched(), READY)
    assert (told.state(), told.life.restarts) == ("ready", 1)
    told.tell(DIED, Cleared(), at=210.0)
    assert told.life.start_at == 212.0


def test_nothing_is_started_before_the_last_process_is_cleared() -> None:
    told = ready()
    told.tell(DIED, at=200.0)
    assert told.tell(Tick(), at=300.0) == []
    assert told.tell(Cleared()) == [Release()]
    assert told.tell(Tick()) == [Launch()]


def test_too_many_starts_are_a_failure_with_its_cause() -> None:
    told = ready()
    told.cycle()
    told.cycle()
    assert told.state() == "starting"
    assert told.tell(DIED)[-1] == Clear()
    told.tell(Cleared())
    assert told.is_over()
    assert told.state() == "failed"
    assert told.life.cause == "exited with status 1 (started 3 times in 600 s)"
    assert told.life.ending == Ending(exit_code=1)


def test_starts_that_are_long_ago_do_not_count() -> None:
    told = ready()
    for day in range(1, 6):
        told.tell(READY, at=day * 86_400.0)
        told.cycle()
        told.tell(READY)
    assert (told.state(), told.life.restarts) == ("ready", 5)


def test_three_missed_polls_are_not_ready_and_one_answer_brings_it_back() -> None:
    told = ready()
    told.tell(Missed(), Missed())
    assert told.is_serving()
    told.tell(Missed())
    assert told.state() == "starting"
    told.tell(READY)
    assert told.state() == "ready"


def test_a_long_silence_ends_a_process_that_is_alive() -> None:
    told = ready()
    told.tell(Missed(), Missed(), Missed(), at=150.0)
    assert told.tell(Missed(), at=161.0) == [Kill()]
    assert told.tell(Missed(), Tick(), at=171.0) == [], "it is killed once"
    told.tell(Exited(ending=Ending(signal=9), cause="was ended by signal 9"), Cleared())
    assert told.life.cause == "stuck: alive, and without an answer for 61 s"
    assert told.state() == "starting"


@pytest.mark.parametrize(
    ("active", "age_s", "effects"),
    [(1, 121.0, [Kill()]), (1, 119.0, []), (0, 500.0, []), (1, None, [])],
    ids=["stuck", "slow", "idle", "untold"],
)
def test_an_engine_without_a_step_is_dead_if_requests_run(
    active: int, age_s: float | None, effects: list[Effect]
) -> None:
    told = ready()
    assert told.tell(Answered(is_ready=True, active=active, step_age_s=age_s)) == effects


def test_an_idle_engine_that_fails_three_probes_is_dead() -> None:
    told = ready()
    for time in (131.0, 162.0, 193.0):
        assert told.tell(READY, Tick(), at=time) == [Probe()]
        assert told.tell(Tick()) == [], "one probe at a time"
        effects = told.tell(Probed(ok=False))
    assert effects == [Kill()]
    assert told.life.doom == "stalled: 3 one-token probes in a row have failed"


def test_a_good_probe_forgives_the_bad_ones() -> None:
    told = ready()
    for time, ok in ((131.0, False), (162.0, False), (193.0, True), (224.0, False)):
        told.tell(READY, Tick(), at=time)
        assert told.tell(Probed(ok=ok)) == []
    assert told.life.probes_failed == 1


def test_a_busy_engine_is_not_probed() -> None:
    told = ready()
    assert told.tell(Answered(is_ready=True, active=1), Tick(), at=200.0) == []
    assert told.tell(READY, Tick(active=1)) == [], "the hive has just handed it a request"
    assert told.tell(Tick()) == [Probe()]


def test_a_stop_without_a_request_is_a_sigterm_and_then_force() -> None:
    told = ready()
    told.tell(StopAsked(grace_s=30))
    assert told.tell(Tick()) == [Terminate()]
    assert told.state() == "stopping"
    assert told.tell(Tick(), at=129.0) == []
    assert told.tell(Tick(), at=130.0) == [Kill()]
    told.tell(Exited(ending=Ending(signal=9), cause="x"), Cleared())
    assert told.state() == "stopped"
    assert told.is_over()


def test_a_stop_lets_what_runs_finish_within_its_grace() -> None:
    told = ready()
    told.tell(Answered(is_ready=True, active=1), StopAsked(grace_s=30))
    assert told.state() == "draining"
    assert not told.is_serving()
    assert told.tell(Tick(active=1), at=119.0) == []
    assert told.tell(Tick(active=1), at=120.0) == [Terminate()], "10 s are kept for its own exit"
    assert told.tell(Tick(), at=130.0) == [Kill()]


def test_a_stop_without_grace_is_immediate() -> None:
    told = ready()
    assert told.tell(StopAsked(grace_s=0), Tick()) == [Terminate(), Kill()]


def test_a_second_stop_may_only_be_sooner() -> None:
    told = ready()
    told.tell(StopAsked(grace_s=5), StopAsked(grace_s=60))
    assert told.life.kill_at == 105.0
    assert told.tell(StopAsked(grace_s=0), Tick()) == [Kill()]


def test_a_stop_while_it_waits_for_its_next_start() -> None:
    told = ready()
    told.tell(DIED, Cleared())
    assert told.tell(StopAsked(grace_s=5)) == []
    assert told.is_over()
    assert told.tell(Tick(), at=999.0) == []


def test_a_stop_while_its_process_is_being_started() -> None:
    told = Told()
    told.tell(WaiterCame())
    assert told.tell(StopAsked(grace_s=5)) == [TellFailed(cause="was stopped before it was ready")]
    assert told.tell(Launched()) == [Kill()]
    told.tell(DIED, Cleared())
    assert told.state() == "stopped"


def test_the_last_who_waits_stops_a_start_by_leaving() -> None:
    told = Told()
    told.tell(Launched(), WaiterCame(), WaiterCame())
    assert told.tell(WaiterLeft()) == []
    effects = told.tell(WaiterLeft())
    assert effects == [Terminate()]
    assert told.tell(Tick()) == [Kill()]


def test_leaving_after_it_was_ready_stops_nothing() -> None:
    told = ready()
    assert told.tell(WaiterLeft()) == []
    assert told.is_serving()


def test_draining_and_back() -> None:
    told = ready()
    told.tell(DrainAsked(draining=True))
    assert told.state() == "draining"
    told.tell(DrainAsked(draining=False))
    assert told.state() == "ready"


def test_asleep_it_neither_serves_nor_is_probed() -> None:
    told = ready()
    told.tell(Answered(is_ready=False, is_asleep=True))
    assert (told.state(), told.is_serving()) == ("sleeping", False)
    assert told.tell(Tick(), at=999.0) == []
    told.tell(READY)
    assert told.is_serving()


def test_an_adopted_worker_goes_on_where_it_was() -> None:
    def take(**fields: bool) -> Life:
        values = {"was_ready": True, "is_stopping": False, "is_draining": False} | fields
        return adopted(100.0, policy=POLICY, **values)

    assert take().state == "starting", "until it answers"
    assert on(take(), READY, 101.0, POLICY)[0].state == "ready"
    assert on(take(is_draining=True), READY, 101.0, POLICY)[0].state == "draining"
    loading = take(was_ready=False)
    assert on(loading, READY, 101.0, POLICY)[1] == [TellReady()]
    assert on(loading, WaiterCame(), 101.0, POLICY)[0].waiters == 1
    stopping = take(is_stopping=True)
    assert on(stopping, Tick(), 111.0, POLICY)[1] == [Kill()]


@pytest.mark.parametrize(
    ("failures", "wait_s"), [(0, 1.0), (1, 1.0), (2, 2.0), (5, 16.0), (9, 60.0), (10**6, 60.0)]
)
def test_the_wait_doubles_up_to_its_cap_and_jitter_adds_to_it(failures: int, wait_s: float) -> None:
    assert backoff_s(POLICY, failures, 0.0) == wait_s
    assert backoff_s(POLICY, failures, 1.0) == pytest.approx(wait_s * 1.2)


@pytest.mark.parametrize(
    "event", [LaunchFailed(cause="x"), DIED, READY, Missed(), Probed(ok=False), Cleared(), Launched()]
)
def test_what_comes_too_late_changes_nothing(event: Event) -> None:
    told = Told()
    told.tell(Launched(), DIED, Cleared())
    over = told.life
    assert told.tell(event) == []
    assert told.life == over


# --- what always holds ---------------------------------------------------------------------------------


class World:
    """One worker's process and port as they really are; performs effects and refuses what must not be."""

    def __init__(self, ports: set[int]) -> None:
        self.ports = ports
        self.port: int | None = None
        self.process = "none"
        self.waiting = 0
        self.told = 0

    def perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Launch():
                    assert self.process == "none", "a second process of one worker"
                    assert self.port is None, "the port and the memory of the process before are still held"
                    self.process = "launching"
                    self.port = next(port for port in range(9300, 9400) if port not in self.ports)
                    self.ports.add(self.port)
                case Terminate() | Kill() | Probe():
                    assert self.process == "running", f"{effect} without a process"
                case Clear():
                    assert self.process == "ended"
                    self.process = "clearing"
                case Release():
                    assert self.process in ("none", "cleared"), "released under a process that may live"
                    assert self.port is not None
                    self.ports.remove(self.port)
                    self.process, self.port = "none", None
                case TellReady() | TellFailed():
                    self.told += self.waiting
                    self.waiting = 0


class Lives(RuleBasedStateMachine):
    """Three workers on shared ports, with everything that can happen to them, in any order."""

    policy = Policy(startup_s=50, stall_s=20, probe_every_s=5, silence_s=15, start_window_s=100)

    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.ports: set[int] = set()
        self.lives: list[Life] = []
        self.worlds: list[World] = []
        for _ in range(3):
            life, effects = begin(self.now)
            world = World(self.ports)
            world.perform(effects)
            self.lives.append(life)
            self.worlds.append(world)

    def tell(self, number: int, event: Event) -> None:
        self.lives[number], effects = on(self.lives[number], event, self.now, self.policy)
        self.worlds[number].perform(effects)

    numbers = st.integers(min_value=0, max_value=2)

    @rule(number=numbers, works=st.booleans())
    def launch_ends(self, number: int, works: bool) -> None:
        world = self.worlds[number]
        if world.process != "launching":
            return
        world.process = "running" if works else "none"
        self.tell(number, Launched() if works else LaunchFailed(cause="x", jitter=0.5))

    @rule(number=numbers)
    def process_ends(self, number: int) -> None:
        if self.worlds[number].process == "running":
            self.worlds[number].process = "ended"
            self.tell(number, DIED)

    @rule(number=numbers)
    def cleared(self, number: int) -> None:
        if self.worlds[number].process == "clearing":
            self.worlds[number].process = "cleared"
            self.tell(number, Cleared())

    @rule(number=numbers, ready=st.booleans(), active=st.integers(0, 2), age_s=st.floats(0, 40))
    def answers(self, number: int, ready: bool, active: int, age_s: float) -> None:
        self.tell(number, Answered(is_ready=ready, active=active, step_age_s=age_s))

    @rule(number=numbers, asleep=st.booleans())
    def sleeps(self, number: int, asleep: bool) -> None:
        self.tell(number, Answered(is_ready=not asleep, is_asleep=asleep))

    @rule(number=numbers)
    def misses(self, number: int) -> None:
        self.tell(number, Missed())

    @rule(number=numbers, ok=st.booleans())
    def probed(self, number: int, ok: bool) -> None:
        self.tell(number, Probed(ok=ok))

    @rule(number=numbers, draining=st.booleans())
    def drain(self, number: int, draining: bool) -> None:
        self.tell(number, DrainAsked(draining=draining))

    @rule(number=numbers, grace_s=st.floats(0, 60))
    def stop(self, number: int, grace_s: float) -> None:
        self.tell(number, StopAsked(grace_s=grace_s))

    @precondition(lambda self: any(life.phase == "starting" for life in self.lives))
    @rule(number=numbers)
    def waiter_comes(self, number: int) -> None:
        life = self.lives[number]
        if life.phase == "starting" and not life.has_been_ready:
            self.worlds[number].waiting += 1
            self.tell(number, WaiterCame())

    @rule(number=numbers)
    def waiter_leaves(self, number: int) -> None:
        if self.worlds[number].waiting:
            self.worlds[number].waiting -= 1
            self.tell(number, WaiterLeft())

    @rule(seconds=st.floats(0.1, 30), active=st.integers(0, 1))
    def time_passes(self, seconds: float, active: int) -> None:
        self.now += seconds
        for number in range(3):
            self.tell(number, Tick(active=active))

    @invariant()
    def who_waits_is_counted(self) -> None:
        if hasattr(self, "lives"):
            for life, world in zip(self.lives, self.worlds, strict=True):
                assert life.waiters == world.waiting
                if life.is_over:
                    assert world.waiting == 0
                    assert world.process in ("none", "cleared")

    @invariant()
    def only_a_running_process_serves(self) -> None:
        if hasattr(self, "lives"):
            for life, world in zip(self.lives, self.worlds, strict=True):
                assert not life.is_serving or world.process == "running"

    def teardown(self) -> None:
        """Whatever happened: left alone, every worker ends up serving or over, and nobody waits for ever."""
        if not hasattr(self, "lives"):
            return
        for _ in range(200):
            self.now += 5.0
            for number in range(3):
                world = self.worlds[number]
                self.launch_ends(number, works=True)
                self.tell(number, Missed())
                self.tell(number, Tick())
                if self.lives[number].is_killed or self.lives[number].phase == "stopping":
                    self.process_ends(number)
                self.cleared(number)
                assert world.process != "ended"
        for life, world in zip(self.lives, self.worlds, strict=True):
            assert world.waiting == 0
            assert life.is_over or life.has_been_ready, life


Lives.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase
