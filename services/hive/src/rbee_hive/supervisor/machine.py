"""One worker's life as a pure state machine: `(life, event, now) -> (life, effects)`.

It knows no clock, no process and no socket. The shell (`workers.py`) performs the effects and says what
came of them as the next events. `now` is monotonic seconds; jitter comes in with the event that needs it.

Three questions are kept apart. Has it *started*: within `startup_s`, however silent it is meanwhile.
Is it *ready*: its API has answered lately. Is it *alive*: its engine makes steps while it has requests, and
generates one token now and then while it has none.
"""

from typing import Literal, TypeAlias, assert_never

import msgspec
from msgspec import Struct

from rbee_contracts.nodes import WorkerState


class Policy(Struct, frozen=True, kw_only=True):
    """When a worker is given up, and when it is started again. Times in seconds.

    Args:
        startup_s: in which a worker must become ready after its process was started.
        stall_s: without an engine step while requests run, after which the engine is dead.
        probe_every_s: between two one-token probes of an idle worker.
        probe_timeout_s: for one probe.
        probes_failed: probes in a row that fail before the engine is dead.
        polls_missed: polls in a row without an answer before the worker is not ready.
        silence_s: without an answer, the process alive, after which it is ended.
        backoff_first_s: before the first start again; doubles each time.
        backoff_most_s: the longest wait, jitter left out.
        backoff_jitter: the share of the wait that jitter adds at most.
        start_limit: starts within `start_window_s` after which a worker that ends is `failed`.
        start_window_s: see `start_limit`.
        exit_s: kept of a stop's grace for the worker's own exit, once its requests have ended.
        hive_absence_s: without a word of its hive, after which a worker stops itself.
    """

    startup_s: float = 1800.0
    stall_s: float = 120.0
    probe_every_s: float = 30.0
    probe_timeout_s: float = 30.0
    probes_failed: int = 3
    polls_missed: int = 3
    silence_s: float = 60.0
    backoff_first_s: float = 1.0
    backoff_most_s: float = 60.0
    backoff_jitter: float = 0.2
    start_limit: int = 3
    start_window_s: float = 600.0
    exit_s: float = 10.0
    hive_absence_s: float = 900.0


def backoff_s(policy: Policy, failures: int, jitter: float) -> float:
    """Give the wait after the `failures`th failure in a row (from 1). `jitter` is 0 to 1."""
    doubled = policy.backoff_first_s * 2.0 ** min(max(failures, 1) - 1, 30)
    return min(policy.backoff_most_s, doubled) * (1 + policy.backoff_jitter * jitter)


Process: TypeAlias = Literal["none", "launching", "running", "clearing"]
"""`clearing`: the process has ended; what it left is being ended, and its device memory awaited."""

Phase: TypeAlias = Literal["starting", "up", "stopping", "stopped", "failed"]


class Ending(Struct, frozen=True, kw_only=True):
    """How a process ended. Both numbers are None where the process was not this hive's child."""

    exit_code: int | None = None
    signal: int | None = None


class Life(Struct, frozen=True, kw_only=True):
    """All that is decided about one worker. `state` is what others see.

    `cause` tells the last failure; it stays while the worker is started again.
    """

    phase: Phase = "starting"
    process: Process = "none"
    has_been_ready: bool = False
    is_answering: bool = False
    is_asleep: bool = False
    is_draining: bool = False
    active: int = 0
    waiters: int = 0
    starts: tuple[float, ...] = ()
    restarts: int = 0
    start_at: float | None = None
    """When a start that is due begins; None while none is."""
    launched_at: float = 0.0
    answered_at: float = 0.0
    missed: int = 0
    is_probing: bool = False
    probed_at: float = 0.0
    probes_failed: int = 0
    term_at: float | None = None
    kill_at: float | None = None
    is_killed: bool = False
    doom: str | None = None
    """Why this process is being ended by force."""
    ending: Ending = Ending()
    cause: str | None = None

    @property
    def state(self) -> WorkerState:
        """What the worker is, for others. One that does not answer now counts as starting."""
        if self.phase != "up":
            return "starting" if self.phase == "starting" else self.phase
        if self.is_draining or self.term_at is not None:
            return "draining"
        if not self.is_answering:
            return "starting"
        if self.is_asleep:
            return "sleeping"
        return "busy" if self.active else "ready"

    @property
    def is_serving(self) -> bool:
        """Whether it takes requests."""
        return self.state in ("ready", "busy")

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it by itself, and nothing of it is left."""
        return self.phase in ("stopped", "failed") and self.process == "none"


# --- events --------------------------------------------------------------------------------------------


class Launched(Struct, frozen=True):
    """Its process runs."""


class LaunchFailed(Struct, frozen=True, kw_only=True):
    """No process could be started."""

    cause: str
    jitter: float = 0.0


class Answered(Struct, frozen=True, kw_only=True):
    """Its API has answered, with its nonce. `step_age_s` by the worker's own clock."""

    is_ready: bool
    is_asleep: bool = False
    active: int = 0
    step_age_s: float | None = None


class Missed(Struct, frozen=True):
    """Its API has not answered in time, or something else answered on its port."""


class Probed(Struct, frozen=True, kw_only=True):
    """A one-token probe has come to its end."""

    ok: bool


class Exited(Struct, frozen=True, kw_only=True):
    """Its process has ended. `cause` is told where this hive did not end it."""

    ending: Ending
    cause: str
    jitter: float = 0.0


class Cleared(Struct, frozen=True):
    """Nothing of the process is left: no child of it, no device memory."""


class Tick(Struct, frozen=True, kw_only=True):
    """Time has passed. `active`: requests that the hive has on it."""

    active: int = 0


class WaiterCame(Struct, frozen=True):
    """Somebody waits for it to become ready."""


class WaiterLeft(Struct, frozen=True):
    """Somebody who waited has gone; the last one's leaving stops a worker that was never ready."""


class StopAsked(Struct, frozen=True, kw_only=True):
    """It is to end: `grace_s` seconds for what runs on it, then by force."""

    grace_s: float


class DrainAsked(Struct, frozen=True, kw_only=True):
    """It is to take nothing new, or to take work again."""

    draining: bool


Event: TypeAlias = (
    Launched
    | LaunchFailed
    | Answered
    | Missed
    | Probed
    | Exited
    | Cleared
    | Tick
    | WaiterCame
    | WaiterLeft
    | StopAsked
    | DrainAsked
)


# --- effects -------------------------------------------------------------------------------------------


class Launch(Struct, frozen=True):
    """Start a process: a new port, token and nonce. Answer: `Launched` or `LaunchFailed`."""


class Terminate(Struct, frozen=True):
    """SIGTERM to the worker's process, which drains and ends its engine."""


class Kill(Struct, frozen=True):
    """SIGKILL to everything of it that is proven ours. Answer: `Exited`."""


class Clear(Struct, frozen=True):
    """End what the process left and wait, bounded, for its device memory. Answer: `Cleared`."""


class Probe(Struct, frozen=True):
    """Have its engine generate one token. Answer: `Probed`."""


class TellReady(Struct, frozen=True):
    """All who wait have what they wait for."""


class TellFailed(Struct, frozen=True, kw_only=True):
    """All who wait fail, once, with this cause."""

    cause: str


class Release(Struct, frozen=True):
    """Nothing of the process holds its port or its reservation any more."""


Effect: TypeAlias = Launch | Terminate | Kill | Clear | Probe | TellReady | TellFailed | Release
Step: TypeAlias = tuple[Life, list[Effect]]


def begin(now: float) -> Step:
    """Begin a worker's life with its first start."""
    return Life(process="launching", starts=(now,), launched_at=now, answered_at=now, probed_at=now), [
        Launch()
    ]


def adopted(now: float, *, was_ready: bool, is_stopping: bool, is_draining: bool, policy: Policy) -> Life:
    """Take up a worker whose process was found running. Where it stood is told by its record."""
    life = Life(
        phase="up" if was_ready else "starting",
        process="running",
        has_been_ready=was_ready,
        is_draining=is_draining,
        starts=(now,),
        launched_at=now,
        answered_at=now,
        probed_at=now,
    )
    if is_stopping:
        life = _with(life, phase="stopping", kill_at=now + policy.exit_s)
    return life


def on(life: Life, event: Event, now: float, policy: Policy) -> Step:
    """Take in an event; give the life after it, and what is to be done. A late one changes nothing."""
    match event:
        case Launched():
            return _launched(life, now)
        case LaunchFailed():
            if life.process != "launching":
                return life, []
            life = _with(life, process="none", ending=Ending())
            life, effects = _ended(life, event.cause, event.jitter, now, policy)
            return life, [*effects, Release()]
        case Answered():
            return _answered(life, event, now, policy)
        case Missed():
            return _missed(life, now, policy)
        case Probed():
            return _probed(life, event, now, policy)
        case Exited():
            if life.process not in ("running", "launching"):
                return life, []
            life = _with(life, process="clearing", ending=event.ending, is_probing=False, active=0)
            life, effects = _ended(life, life.doom or event.cause, event.jitter, now, policy)
            return life, [*effects, Clear()]
        case Cleared():
            return _cleared(life, now)
        case Tick():
            return _tick(life, event, now, policy)
        case WaiterCame():
            return _with(life, waiters=life.waiters + 1), []
        case WaiterLeft():
            life = _with(life, waiters=max(0, life.waiters - 1))
            if life.waiters or life.has_been_ready or life.phase != "starting":
                return life, []
            return _stop(life, 0.0, now, policy)
        case StopAsked():
            return _stop(life, event.grace_s, now, policy)
        case DrainAsked():
            return _with(life, is_draining=event.draining), []
        case _:
            assert_never(event)


# --- what events mean ----------------------------------------------------------------------------------


def _launched(life: Life, now: float) -> Step:
    if life.process != "launching":
        return life, []
    life = _with(
        life,
        process="running",
        launched_at=now,
        answered_at=now,
        probed_at=now,
        missed=0,
        probes_failed=0,
        is_answering=False,
        is_asleep=False,
        is_killed=False,
        doom=None,
    )
    if life.phase == "stopping":  # asked to stop while it was being started
        return _with(life, is_killed=True), [Kill()]
    return life, []


def _answered(life: Life, event: Answered, now: float, policy: Policy) -> Step:
    if life.process != "running":
        return life, []
    life = _with(life, answered_at=now, missed=0, active=event.active, is_asleep=event.is_asleep)
    if life.phase == "stopping":
        return life, []
    if not event.is_ready and not event.is_asleep:
        return _with(life, is_answering=False), []
    effects: list[Effect] = []
    if life.phase == "starting":
        life = _with(life, phase="up", has_been_ready=True, probed_at=now, waiters=0)
        effects.append(TellReady())
    life = _with(life, is_answering=True)
    stalled = event.active > 0 and (event.step_age_s or 0.0) > policy.stall_s and not event.is_asleep
    if stalled:
        return _doom(
            life, f"stalled: no engine step for {event.step_age_s:.0f} s with requests running", effects
        )
    return life, effects


def _missed(life: Life, now: float, policy: Policy) -> Step:
    if life.process != "running" or life.phase != "up":
        return life, []  # a worker that starts or stops may be silent; their own limits hold
    life = _with(life, missed=life.missed + 1)
    if life.missed >= policy.polls_missed:
        life = _with(life, is_answering=False)
    silent_s = now - life.answered_at
    if life.missed >= policy.polls_missed and silent_s > policy.silence_s:
        return _doom(life, f"stuck: alive, and without an answer for {silent_s:.0f} s", [])
    return life, []


def _probed(life: Life, event: Probed, now: float, policy: Policy) -> Step:
    if not life.is_probing:
        return life, []
    life = _with(
        life, is_probing=False, probed_at=now, probes_failed=0 if event.ok else life.probes_failed + 1
    )
    if life.probes_failed >= policy.probes_failed:
        return _doom(life, f"stalled: {life.probes_failed} one-token probes in a row have failed", [])
    return life, []


def _cleared(life: Life, now: float) -> Step:
    if life.process != "clearing":
        return life, []
    life = _with(life, process="none")
    if life.phase == "stopping":
        life = _with(life, phase="stopped")
    return life, [Release()]


def _tick(life: Life, event: Tick, now: float, policy: Policy) -> Step:
    active = max(event.active, life.active) if life.process == "running" else 0
    if life.process == "none":
        if life.phase == "starting" and life.start_at is not None and now >= life.start_at:
            return _start_again(life, now, policy)
        return life, []
    if life.process != "running" or life.is_killed:
        return life, []
    if life.phase == "starting":
        if now - life.launched_at > policy.startup_s:
            return _doom(life, f"was not ready {policy.startup_s:g} s after its start", [])
        return life, []
    if life.kill_at is not None and now >= life.kill_at:
        return _with(life, is_killed=True), [Kill()]
    if life.phase == "up" and life.term_at is not None:
        if now >= life.term_at or not active:
            return _with(life, phase="stopping", term_at=None), [Terminate()]
        return life, []
    probing_is_due = life.state in ("ready", "draining") and now - life.probed_at >= policy.probe_every_s
    if probing_is_due and not active and life.is_answering and not life.is_asleep and not life.is_probing:
        return _with(life, is_probing=True), [Probe()]
    return life, []


def _start_again(life: Life, now: float, policy: Policy) -> Step:
    starts = (*_recent(life.starts, now, policy), now)
    life = _with(
        life, process="launching", start_at=None, starts=starts, restarts=life.restarts + 1, launched_at=now
    )
    return life, [Launch()]


def _ended(life: Life, cause: str, jitter: float, now: float, policy: Policy) -> Step:
    """Decide what becomes of a worker without a process."""
    life = _with(life, is_answering=False, is_asleep=False, term_at=None, kill_at=None, doom=None, active=0)
    if life.phase == "stopping":
        phase: Phase = "stopped" if life.process == "none" else "stopping"
        told: list[Effect] = [TellFailed(cause="was stopped before it was ready")] if life.waiters else []
        return _with(life, phase=phase, waiters=0), told
    life = _with(life, cause=cause)
    recent = _recent(life.starts, now, policy)
    if not life.has_been_ready or len(recent) >= policy.start_limit:
        if life.has_been_ready:
            life = _with(life, cause=f"{cause} (started {len(recent)} times in {policy.start_window_s:g} s)")
        return _with(life, phase="failed", waiters=0), [TellFailed(cause=cause)]
    wait_s = backoff_s(policy, len(recent), jitter)
    return _with(life, phase="starting", start_at=now + wait_s), []


def _stop(life: Life, grace_s: float, now: float, policy: Policy) -> Step:
    if life.phase in ("stopped", "failed"):
        return life, []
    told: list[Effect] = []
    if life.waiters:
        told.append(TellFailed(cause="was stopped before it was ready"))
        life = _with(life, waiters=0)
    kill_at = now + grace_s
    if life.kill_at is not None:
        kill_at = min(kill_at, life.kill_at)
    life = _with(life, kill_at=kill_at, start_at=None)
    match life.process:
        case "none":
            return _with(life, phase="stopped"), told
        case "launching" | "clearing":
            return _with(life, phase="stopping"), told
    if life.phase == "stopping":
        return life, told
    wait_s = grace_s - policy.exit_s
    if life.phase == "up" and wait_s > 0:
        return _with(life, term_at=now + wait_s), told  # the next tick ends it where nothing runs on it
    return _with(life, phase="stopping", term_at=None), [*told, Terminate()]


def _doom(life: Life, cause: str, effects: list[Effect]) -> Step:
    if life.is_killed:
        return life, effects
    return _with(life, is_killed=True, is_answering=False, doom=cause), [*effects, Kill()]


def _recent(starts: tuple[float, ...], now: float, policy: Policy) -> tuple[float, ...]:
    return tuple(start for start in starts if now - start < policy.start_window_s)


def _with(life: Life, **changes: object) -> Life:
    return msgspec.structs.replace(life, **changes)
