"""Whether a hive is there: the decision of `liveness`, for any order of beats, ticks and pauses."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_queen.fleet.liveness import (
    LATE_TICK_S,
    Beat,
    Effect,
    Event,
    Life,
    Patience,
    Tick,
    known,
    step,
)

PATIENCE = Patience(unreachable_after_s=5.0, lost_after_s=30.0)


def live(life: Life, *events: tuple[float, Event]) -> tuple[Life, list[Effect]]:
    """Take events in at their times; give where that leads and all effects."""
    had = []
    for now, event in events:
        life, effects = step(life, event, now, PATIENCE)
        had += effects
    return life, had


def ticks(first: float, last: float) -> list[tuple[float, Event]]:
    return [(first + 0.5 * number, Tick()) for number in range(int((last - first) / 0.5) + 1)]


def test_the_whole_way_down_and_back() -> None:
    life, effects = live(known("b", 0.0), (0.0, Beat("b")))
    assert (life.state, effects) == ("online", [Effect.ONLINE])

    life, effects = live(life, *ticks(0.5, 5.0))
    assert (life.state, effects) == ("online", [])

    life, effects = live(life, *ticks(5.5, 30.0))
    assert (life.state, effects) == ("unreachable", [Effect.UNREACHABLE])

    life, effects = live(life, *ticks(30.5, 300.0))
    assert (life.state, effects) == ("lost", [Effect.LOST])

    life, effects = live(life, (301.0, Beat("b")), (301.5, Tick()))
    assert (life.state, effects) == ("online", [Effect.ONLINE])


def test_a_hive_that_was_never_heard_goes_the_same_way() -> None:
    life, effects = live(known("b", 0.0), *ticks(0.5, 40.0))

    assert (life.state, effects) == ("lost", [Effect.UNREACHABLE, Effect.LOST])


def test_another_boot_is_a_restart() -> None:
    life, _ = live(known("b", 0.0), (0.0, Beat("b")))
    life, effects = live(life, (1.0, Beat("c")), (2.0, Beat("c")))

    assert (life.boot, effects) == ("c", [Effect.RESTARTED])


def test_no_silence_is_counted_while_the_queen_stood_still() -> None:
    life, _ = live(known("b", 0.0), (0.0, Beat("b")), *ticks(0.5, 3.0))
    life, effects = live(life, (1000.0, Tick()), *ticks(1000.5, 1001.5))
    assert (life.state, effects) == ("online", [])

    life, effects = live(life, *ticks(1002.0, 1003.0))
    assert (life.state, effects) == ("unreachable", [Effect.UNREACHABLE])

    life, effects = live(life, (5000.0, Tick()))
    assert (life.state, effects) == ("unreachable", [])


steps = st.lists(
    st.tuples(
        st.floats(0, 60),
        st.one_of(st.just(Tick()), st.sampled_from([Beat("b"), Beat("c")])),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(steps)
def test_what_always_holds(moves: list[tuple[float, Event]]) -> None:
    now, life = 100.0, known("b", 100.0)
    unreachable_since_online = lost_since_online = 0
    listened = 0.0  # to the silence, since it was last heard
    for passed_s, event in moves:
        now += passed_s
        before = life
        late = now - life.ticked > LATE_TICK_S
        life, effects = step(life, event, now, PATIENCE)
        assert life.ticked == now
        assert life.heard <= now
        match event:
            case Beat(boot):
                listened = 0.0
                unreachable_since_online = lost_since_online = 0
                assert (life.state, life.boot, life.heard) == ("online", boot, now)
                assert (Effect.ONLINE in effects) == (before.state != "online")
                assert (Effect.RESTARTED in effects) == (before.boot != boot)
            case Tick():
                listened += 0.0 if late else now - before.ticked
                unreachable_since_online += Effect.UNREACHABLE in effects
                lost_since_online += Effect.LOST in effects
                assert life.boot == before.boot
                # A state follows from silence that was listened to, and from nothing else.
                assert abs(life.silence_s(now) - listened) < 1e-6
                assert (life.state in ("unreachable", "lost")) == (unreachable_since_online == 1)
                assert (life.state == "lost") == (lost_since_online == 1)
                if listened > PATIENCE.unreachable_after_s + 1e-6:
                    assert life.state in ("unreachable", "lost")
                if listened < PATIENCE.unreachable_after_s - 1e-6:
                    assert life.state in ("connecting", "online")


@settings(deadline=None)
@given(steps, st.floats(-1e6, 1e6))
def test_only_differences_of_one_clock_count(moves: list[tuple[float, Event]], shift: float) -> None:
    """F39: whatever the clock shows, the same intervals give the same states."""
    at, here, there = 0.0, known("b", 0.0), known("b", shift)
    for passed_s, event in moves:
        passed_s = round(passed_s * 8) / 8  # exact in both
        at += passed_s
        here, effects = step(here, event, at, PATIENCE)
        there, effects_there = step(there, event, round(shift * 8) / 8 + at, PATIENCE)
        if shift == round(shift * 8) / 8:
            assert (here.state, effects) == (there.state, effects_there)
