"""The scheduler is pure: the same snapshot and request always give the same decision, with reasons."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_contracts.events import Decision
from rbee_queen.scheduler import NoPlacement, Request, Snapshot, WorkerView, schedule


def worker(worker_id: str = "w1", **changes: object) -> WorkerView:
    values = {
        "hive_id": "box1",
        "worker_id": worker_id,
        "model": "m",
        "state": "ready",
        "is_hive_online": True,
        "reported": 0,
        "assigned": 0,
    }
    return WorkerView(**(values | changes))  # type: ignore[arg-type]


def decide(*workers: WorkerView, **request: str) -> Decision | NoPlacement:
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
        ({"state": "starting"}, {}, "is starting"),
        ({"is_hive_online": False}, {}, "hive box1 cannot be reached"),
        ({}, {"hive_id": "box2"}, "not on hive box2, to which the request is pinned"),
        ({}, {"worker_id": "w9"}, "not worker w9, to which the request is pinned"),
    ],
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
    state=st.sampled_from(["starting", "ready", "stopping", "stopped", "failed"]),
    is_hive_online=st.booleans(),
    reported=st.integers(0, 9),
    assigned=st.integers(0, 9),
)


@given(st.lists(views, max_size=8, unique_by=lambda view: (view.hive_id, view.worker_id)))
def test_a_decision_is_always_a_ready_worker_of_the_model_and_never_a_busier_one(
    workers: list[WorkerView],
) -> None:
    outcome = decide(*workers)
    able = [w for w in workers if w.model == "m" and w.state == "ready" and w.is_hive_online]

    assert len(outcome.candidates) == len(workers)
    if isinstance(outcome, NoPlacement):
        assert not able
    else:
        chosen = next(w for w in able if (w.hive_id, w.worker_id) == (outcome.hive_id, outcome.worker_id))
        assert max(chosen.reported, chosen.assigned) == min(max(w.reported, w.assigned) for w in able)
