"""Trying elsewhere: which failures another worker may not have, and how many retries there may be. Pure.

A request is tried a second time at most, and only before it has spoken. The budget is for all requests of
the queen together, so that retries never make an outage worse: a fifth of the requests, and some more
that a small cluster or a single lost hive needs. Finagle's `RetryBudget` has the same shape and the same
figures (20 %, and 10 a second over 10 s), and Envoy's `retry_budget` the same share.
"""

from msgspec import Struct

MAX_ATTEMPTS = 2
"""How often a request is tried in all."""

SHARE = 0.2
"""Retries for each request that was taken."""

RESERVE = 100.0
"""Retries that there may be at one moment; what is not used does not add up beyond it."""

RESERVE_PER_S = 10.0
"""How fast the reserve comes back."""

HIVE_FAILURES = frozenset({"hive_lost", "hive_unreachable", "unreachable", "shutting_down", "draining"})
"""The hive cannot run it, whichever of its workers it was meant for. Workers have two of these codes too."""

WORKER_FAILURES = frozenset(
    {
        "worker_lost",
        "worker_not_found",
        "worker_not_ready",
        "no_worker",
        "engine_died",
    }
)
"""The worker cannot run it, and others of its hive may."""


def may_go_elsewhere(code: str) -> bool:
    """Whether a failure is the place's and not the request's."""
    return code in HIVE_FAILURES or code in WORKER_FAILURES


class Budget(Struct, frozen=True, kw_only=True):
    """How many retries are left at a time of the monotonic clock."""

    left: float = RESERVE
    at: float


def deposited(budget: Budget, now: float) -> Budget:
    """Take in that a request was accepted."""
    return Budget(left=min(RESERVE, _refilled(budget, now).left + SHARE), at=now)


def withdrawn(budget: Budget, now: float) -> Budget | None:
    """Take one retry out; None when there is none left."""
    refilled = _refilled(budget, now)
    return None if refilled.left < 1 else Budget(left=refilled.left - 1, at=now)


def left(budget: Budget, now: float) -> float:
    """Give how many retries there may be now."""
    return _refilled(budget, now).left


def _refilled(budget: Budget, now: float) -> Budget:
    passed_s = max(0.0, now - budget.at)
    return Budget(left=min(RESERVE, budget.left + passed_s * RESERVE_PER_S), at=now)
