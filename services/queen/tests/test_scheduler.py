"""The scheduler is pure: the same snapshot and request always give the same decision, with reasons."""

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_contracts.events import Decision
from rbee_contracts.nodes import HiveState, WorkerState
from rbee_queen.scheduler import NoPlacement, Request, Snapshot, Tried, WorkerView, schedule


def worker(worker_id: str = "w1", **changes: object) -> WorkerView:
    values = {
        "hive_id": "box1",
        "worker_id": worker_id,
        "model": "m",
        "state": "ready",
        "hive_state": "online",
        "reported": 0,
        "assigned": 0,
    }
    return WorkerView(**(values | changes))  # type: ignore[arg-type]


def decide(*workers: WorkerView, **request: Any) -> Decision | NoPlacement:
    return schedule(Snapshot(workers=workers), Request(**({"model": "m"} | request)))


def test_the_least_busy_worker_is_chosen() -> None:
    decision = decide(worker("w1", reported=3), worker("w2", reported=1), worker("w3", reported=2))

    assert isinstance(decision, Decision)
    assert decision.worker_id == "w2"
    assert decision.reason == "1 request on it, fewest of 3 workers"


def test_our_own_assignments_count_before_a_heartbeat_tells_of_them() -> None:
    decision = decide(worker("w1", reported=0, assigned=5), worker("w2", reported=1))

    assert isinstance(decision, Decision)
    assert decision.worker_id == "w2"


@pytest.mark.parametrize(
    ("changes", "request_", "reason"),
    [
        ({"model": "other"}, {}, "serves other"),
        ({"state": "starting"}, {}, "is starting: its model is still loading"),
        ({"state": "draining"}, {}, "is draining: it finishes what it has and takes nothing new"),
        ({"state": "sleeping"}, {}, "sleeps: its model has left the device; rbee model load wakes it"),
        ({"state": "stopping"}, {}, "is stopping"),
        ({"state": "stopped"}, {}, "has stopped"),
        ({"state": "failed"}, {}, "has failed"),
        ({"hive_state": "connecting"}, {}, "hive box1 has not been heard yet"),
        ({"hive_state": "unreachable"}, {}, "hive box1 is silent and gets nothing new until it answers"),
        ({"hive_state": "lost"}, {}, "hive box1 has been silent for too long and was given up"),
        (
            {"is_hive_draining": True},
            {},
            "hive box1 is draining: it finishes what it has and takes nothing new",
        ),
        ({}, {"hive_id": "box2"}, "not on hive box2, to which the request is pinned"),
        ({}, {"worker_id": "w9"}, "not worker w9, to which the request is pinned"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_rejected_worker_keeps_its_reason(
    changes: dict[str, object], request_: dict[str, str], reason: str
) -> None:
    outcome = decide(worker("w1", **changes), **request_)

    assert isinstance(outcome, NoPlacement)
    assert [candidate.reason for candidate in outcome.candidates] == [reason]


views = st.builds(
    WorkerView,
    hive_id=st.sampled_from(["a", "b"]),
    worker_id=st.sampled_from([f"w{i}" for i in range(6)]),
    model=st.sampled_from(["m", "n"]),
    state=st.sampled_from(get_args(WorkerState)),
    hive_state=st.sampled_from(get_args(HiveState)),
    is_hive_draining=st.booleans(),
    reported=st.integers(0, 9),
    assigned=st.integers(0, 9),
)


blames = st.builds(
    Tried,
    hive_id=st.sampled_from(["a", "b"]),
    worker_id=st.none() | st.sampled_from(["w0", "w1"]),
    cause=st.just("worker_lost"),
)


@settings(deadline=None)
@given(
    st.lists(views, max_size=8, unique_by=lambda view: (view.hive_id, view.worker_id)),
    st.lists(blames, max_size=2),
)
def test_a_decision_is_always_a_worker_that_takes_requests_and_never_a_busier_one(
    workers: list[WorkerView], tried: list[Tried]
) -> None:
    outcome = schedule(Snapshot(workers=tuple(workers)), Request(model="m", tried=tuple(tried)))
    able = [
        w
        for w in workers
        if w.model == "m"
        and w.state in ("ready", "busy")
        and w.hive_state == "online"
        and not w.is_hive_draining
        and not any(t.hive_id == w.hive_id and t.worker_id in (None, w.worker_id) for t in tried)
    ]

    assert len(outcome.candidates) == len(workers)
    if isinstance(outcome, NoPlacement):
        assert not able
        assert all(candidate.reason and candidate.score is None for candidate in outcome.candidates)
    else:
        chosen = next(w for w in able if (w.hive_id, w.worker_id) == (outcome.hive_id, outcome.worker_id))
        assert max(chosen.reported, chosen.assigned) == min(max(w.reported, w.assigned) for w in able)


def test_a_worker_that_was_tried_is_passed_over_and_so_is_every_worker_of_a_hive_that_was() -> None:
    workers = (worker("w1"), worker("w2"), worker("w3", hive_id="box2"))
    once = Request(model="m", tried=(Tried(hive_id="box1", worker_id="w1", cause="worker_lost"),))
    hive = Request(model="m", tried=(Tried(hive_id="box1", worker_id=None, cause="hive_lost"),))

    second = schedule(Snapshot(workers=workers), once)
    elsewhere = schedule(Snapshot(workers=workers), hive)

    assert isinstance(second, Decision)
    assert isinstance(elsewhere, Decision)
    assert (second.worker_id, elsewhere.worker_id) == ("w2", "w3")
    assert second.candidates[0].reason == "was tried for this request and failed (worker_lost)"
