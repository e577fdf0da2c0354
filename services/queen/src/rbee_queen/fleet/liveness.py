"""Whether a hive is there: decided by the queen's own clock and by what the queen has heard, alone.

A hive is `connecting` until it is first heard, `online` while it is heard, `unreachable` once it has been
silent for a while, and `lost` when that lasts. No time that a hive tells is looked at.
"""

import enum
from typing import TypeAlias, assert_never

from msgspec import Struct
from msgspec.structs import replace

from rbee_contracts.nodes import HiveState

UNREACHABLE_AFTER_S = 5.0
"""Silence after which a hive gets no new work. Heartbeats come every second."""

LOST_AFTER_S = 30.0
"""Silence after which the jobs on a hive end with `hive_lost`, or start elsewhere."""

TICK_EVERY_S = 0.5

LATE_TICK_S = 2.0
"""A tick that is later than this says that the queen herself stood still; no hive is blamed for that."""


class Patience(Struct, frozen=True, kw_only=True):
    """How much silence means what, in seconds."""

    unreachable_after_s: float = UNREACHABLE_AFTER_S
    lost_after_s: float = LOST_AFTER_S


class Life(Struct, frozen=True, kw_only=True):
    """What is known of one hive. `heard` and `ticked` are times of the queen's monotonic clock.

    `heard` is when it last spoke, or became known. `boot` is the incarnation that spoke.
    """

    state: HiveState
    boot: str
    heard: float
    ticked: float

    def silence_s(self, now: float) -> float:
        """Seconds since it was heard."""
        return max(0.0, now - self.heard)


class Beat(Struct, frozen=True):
    """A heartbeat has come from this incarnation."""

    boot: str


class Tick(Struct, frozen=True):
    """Time has passed."""


Event: TypeAlias = Beat | Tick


class Effect(enum.Enum):
    """What a change calls for."""

    ONLINE = "it is there: what it runs is compared with what should run"
    RESTARTED = "another process answers at its address"
    UNREACHABLE = "it gets no new work; nothing is ended"
    LOST = "what runs on it is given up"


def known(boot: str, now: float) -> Life:
    """Begin with a hive that was announced, or stored by the run before."""
    return Life(state="connecting", boot=boot, heard=now, ticked=now)


def step(life: Life, event: Event, now: float, patience: Patience) -> tuple[Life, list[Effect]]:
    """Take in what happened at `now`; give the new life and what it calls for."""
    match event:
        case Beat(boot):
            effects = []
            if boot != life.boot:
                effects.append(Effect.RESTARTED)
            if life.state != "online":
                effects.append(Effect.ONLINE)
            return Life(state="online", boot=boot, heard=now, ticked=max(now, life.ticked)), effects
        case Tick():
            return _tick(life, now, patience)
        case _:
            assert_never(event)


def _tick(life: Life, now: float, patience: Patience) -> tuple[Life, list[Effect]]:
    stood_still_s = now - life.ticked
    # While the queen stood still nobody listened: that was no silence of the hive's.
    heard = life.heard + stood_still_s if stood_still_s > LATE_TICK_S else life.heard
    life = replace(life, heard=heard, ticked=now)
    silence_s = life.silence_s(now)
    if life.state in ("connecting", "online") and silence_s > patience.unreachable_after_s:
        return replace(life, state="unreachable"), [Effect.UNREACHABLE]
    if life.state == "unreachable" and silence_s > patience.lost_after_s:
        return replace(life, state="lost"), [Effect.LOST]
    return life, []
