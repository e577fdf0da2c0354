"""How fast an engine goes: output tokens over the last seconds, and when it made its last step."""

import math
from collections import deque

WINDOW_S = 5.0
"""Over which the rate is taken."""

BIN_S = 0.1
"""Steps within this are counted together."""


class Pace:
    """Counts steps and their output tokens. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._bins: deque[tuple[float, int]] = deque()
        self._last: float | None = None

    def step(self, now: float, tokens: int) -> None:
        """Take in a step that has ended."""
        self._last = now
        if not tokens:
            return
        begin = math.floor(now / BIN_S) * BIN_S
        if self._bins and self._bins[-1][0] == begin:
            self._bins[-1] = (begin, self._bins[-1][1] + tokens)
        else:
            self._bins.append((begin, tokens))
            self._prune(now)

    def tokens_per_second(self, now: float) -> float:
        self._prune(now)
        return round(sum(tokens for _, tokens in self._bins) / WINDOW_S, 2)

    def step_age_s(self, now: float) -> float | None:
        """Seconds since the last step; None before the first."""
        return None if self._last is None else round(max(0.0, now - self._last), 3)

    def _prune(self, now: float) -> None:
        while self._bins and self._bins[0][0] < now - WINDOW_S:
            self._bins.popleft()
