"""What could not be started lately: what can never start fails fast instead of again and again. Pure."""

from collections.abc import Hashable

from msgspec import Struct

from rbee_hive.supervisor.machine import Policy, backoff_s

KEPT = 256


class _Failure(Struct, frozen=True):
    count: int
    cause: str
    failed_at: float
    until: float


class Refusal(Struct, frozen=True):
    """Why something is not tried now. Seconds since the failure, and until the next try."""

    cause: str
    failed_s: float
    retry_s: float


class Failures:
    """Failures in a row, by what was to be started. Times are monotonic seconds."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._failures: dict[Hashable, _Failure] = {}

    def failed(self, key: Hashable, cause: str, now: float, jitter: float) -> None:
        """Note a failure; the wait for the next try doubles with each in a row."""
        before = self._failures.pop(key, None)
        stale = before is None or now - before.until > self._policy.start_window_s
        count = 1 if before is None or stale else before.count + 1
        self._failures[key] = _Failure(count, cause, now, now + backoff_s(self._policy, count, jitter))
        while len(self._failures) > KEPT:
            del self._failures[next(iter(self._failures))]

    def succeeded(self, key: Hashable) -> None:
        self._failures.pop(key, None)

    def refusal(self, key: Hashable, now: float) -> Refusal | None:
        """Tell why `key` is not tried now; None where it may be."""
        failure = self._failures.get(key)
        if failure is None or now >= failure.until:
            return None
        return Refusal(failure.cause, now - failure.failed_at, failure.until - now)
