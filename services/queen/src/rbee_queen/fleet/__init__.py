"""The fleet: which hives there are, what they last told, and the line to each of them.

`liveness`, `identity`, `address` and `reconcile` decide and touch nothing; `fleet` does what they say.
"""

from rbee_queen.fleet.fleet import Fleet
from rbee_queen.fleet.hive import Hive
from rbee_queen.fleet.liveness import LOST_AFTER_S, UNREACHABLE_AFTER_S, Patience

__all__ = ["LOST_AFTER_S", "UNREACHABLE_AFTER_S", "Fleet", "Hive", "Patience"]
