"""How long to wait before the next attempt to reach a hive."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

Uniform: TypeAlias = Callable[[float, float], float]
"""As `random.uniform`: where the jitter comes from."""

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 3.0


def delays(uniform: Uniform) -> Iterator[float]:
    """Give seconds to wait: up to 0.1, then up to the double of it each time, up to 3; half is jitter.

    Hives that vanished together, behind one switch, are so asked again at different moments.
    """
    limit = FIRST_DELAY_S
    while True:
        yield uniform(limit / 2, limit)
        limit = min(limit * 2, MAX_DELAY_S)
