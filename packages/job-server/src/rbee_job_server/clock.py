"""Time, passed in: monotonic for durations, wall for what people read."""

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds that never jump; for durations only."""

    def timestamp(self) -> str:
        """Now, RFC 3339 in UTC, to the microsecond."""


class SystemClock:
    """The machine's clocks. The date is formatted once a second, as every token carries it."""

    def __init__(self) -> None:
        self._second = -1
        self._prefix = ""

    def monotonic(self) -> float:
        return time.monotonic()

    def timestamp(self) -> str:
        second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._prefix}.{nanoseconds // 1000:06d}Z"
