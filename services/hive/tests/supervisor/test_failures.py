"""What failed a moment ago is not tried again at once; the wait doubles, and success forgives."""

from rbee_hive.supervisor.failures import KEPT, Failures, Refusal
from rbee_hive.supervisor.machine import Policy

POLICY = Policy(backoff_first_s=2, backoff_most_s=60, start_window_s=600)


def test_a_failure_refuses_the_next_for_a_while() -> None:
    failures = Failures(POLICY)
    assert failures.refusal("m", 0) is None
    failures.failed("m", "no weights", 10, 0.0)

    assert failures.refusal("m", 11) == Refusal("no weights", 1, 1)
    assert failures.refusal("other", 11) is None
    assert failures.refusal("m", 12) is None


def test_failures_in_a_row_are_refused_for_longer() -> None:
    failures = Failures(POLICY)
    waits = []
    now = 0.0
    for _ in range(6):
        failures.failed("m", "x", now, 0.0)
        refusal = failures.refusal("m", now)
        assert refusal is not None
        waits.append(refusal.retry_s)
        now += refusal.retry_s

    assert waits == [2, 4, 8, 16, 32, 60]


def test_success_and_time_forgive() -> None:
    failures = Failures(POLICY)
    for now in (0, 5, 20):
        failures.failed("m", "x", now, 0.0)
    failures.failed("n", "x", 0, 0.0)
    failures.succeeded("m")
    assert failures.refusal("m", 20) is None
    failures.failed("m", "x", 30, 0.0)
    failures.failed("n", "x", 1000, 0.0)

    for key, now in (("m", 30), ("n", 1000)):
        refusal = failures.refusal(key, now)
        assert refusal is not None
        assert refusal.retry_s == 2


def test_only_so_many_are_remembered() -> None:
    failures = Failures(POLICY)
    for number in range(KEPT + 1):
        failures.failed(number, "x", 0, 0.0)

    assert failures.refusal(0, 0) is None
    assert failures.refusal(KEPT, 0) is not None
