"""How often the queen tries again, and what is left running when she has given something up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_queen.fleet.reconcile import SentStep, strays
from rbee_queen.fleet.reconnect import MAX_DELAY_S, delays
from rbee_queen.retry import RESERVE, RESERVE_PER_S, SHARE, Budget, deposited, may_go_elsewhere, withdrawn


@pytest.mark.parametrize("code", ["worker_lost", "hive_lost", "unreachable", "engine_died", "shutting_down"])
def test_a_lost_place_is_worth_another_one(code: str) -> None:
    assert may_go_elsewhere(code)


@pytest.mark.parametrize(
    "code",
    ["context_length_exceeded", "engine_error", "timeout", "job_lost", "output_too_large", "cancelled"],
)
def test_what_is_the_requests_own_fault_is_not(code: str) -> None:
    assert not may_go_elsewhere(code)


def test_a_lost_hive_of_a_small_cluster_is_within_the_reserve_and_a_storm_is_not() -> None:
    budget: Budget | None = Budget(at=0.0)
    for _ in range(int(RESERVE)):
        assert budget is not None
        budget = withdrawn(budget, 0.0)
    assert budget is not None
    assert withdrawn(budget, 0.0) is None
    assert withdrawn(budget, 0.05) is None
    assert withdrawn(budget, 0.1) is not None
    for _ in range(5):
        budget = deposited(budget, 0.0)
    assert withdrawn(budget, 0.0) is not None


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from(["request", "retry"])), max_size=300))
def test_retries_never_exceed_their_share_of_the_requests_and_the_reserve(
    moves: list[tuple[float, str]],
) -> None:
    now, budget, requests, retries = 0.0, Budget(at=0.0), 0, 0
    for passed_s, move in moves:
        now += passed_s
        if move == "request":
            budget, requests = deposited(budget, now), requests + 1
        else:
            taken = withdrawn(budget, now)
            if taken is not None:
                budget, retries = taken, retries + 1
        assert 0 <= budget.left <= RESERVE
        assert retries <= RESERVE + SHARE * requests + RESERVE_PER_S * now + 1e-6


def test_strays_are_ours_over_and_still_running() -> None:
    sent = [
        SentStep(lower_job_id="over", is_over=True),
        SentStep(lower_job_id="awaited", is_over=False),
        SentStep(lower_job_id="ended", is_over=True),
    ]

    assert strays(["foreign", "awaited", "over"], sent) == ["over"]


def test_attempts_to_reconnect_are_spread_and_bounded() -> None:
    """F40: hives that vanished together are asked again at different moments."""
    low, high = delays(lambda low, _: low), delays(lambda _, high: high)
    lows, highs = [next(low) for _ in range(10)], [next(high) for _ in range(10)]

    assert highs == [0.1, 0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert highs[-1] == MAX_DELAY_S
    assert lows == [limit / 2 for limit in highs]
