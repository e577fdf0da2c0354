"""How fast a download is and how long it will take, from when how many bytes were there. Pure."""

from collections import deque

RATE_WINDOW_S = 5.0
"""Seconds over which the rate is taken."""

MIN_SPAN_S = 0.25
"""Less than this tells no rate."""


class Meter:
    """Counts bytes. `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, now: float, received: int) -> None:
        """Take in how many bytes have come over the network so far."""
        samples = self._samples
        samples.append((now, received))
        while len(samples) > 2 and samples[1][0] <= now - RATE_WINDOW_S:
            samples.popleft()

    def rate(self) -> float:
        """Give bytes per second over the last seconds; 0 before there is anything to tell."""
        if len(self._samples) < 2:
            return 0.0
        (begun, first), (ended, last) = self._samples[0], self._samples[-1]
        span = ended - begun
        return max(0.0, (last - first) / span) if span >= MIN_SPAN_S else 0.0


def eta_s(left: int | None, rate: float) -> float | None:
    """Give the seconds to go; None while that cannot be told."""
    if left is None or (rate <= 0 and left > 0):
        return None
    return 0.0 if left == 0 else round(left / rate, 1)
