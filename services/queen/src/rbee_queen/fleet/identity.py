"""Who holds a hive's id: decided by addresses, boots and what the queen hears, never by a hive's clock.

An incarnation is an address and a boot, the random number that each start of a hive makes. One
incarnation holds an id at a time. "Newer" is decided without comparing the clocks of two machines:

- the same address with another boot is a restart, because only one process can listen there;
- the same boot at another address is the same process, which has moved;
- another boot at another address is another hive. While the holder is heard, or may still be, the
  other is refused. When the holder is silent the other takes the id, and the holder's boot is fenced:
  it is refused from then on, so an id never goes back and forth between two machines.
"""

import enum

from msgspec import Struct

from rbee_contracts.nodes import HiveState


class Incarnation(Struct, frozen=True):
    """One start of a hive, at one address."""

    url: str
    boot: str


class Verdict(enum.Enum):
    """What becomes of an announcement."""

    NEW = "nobody had the id: follow it"
    KNOWN = "it holds the id already"
    RESTARTED = "it holds the id, by its address; the boot is another one"
    MOVED = "it holds the id; its address is another one now"
    REPLACES = "it takes the id over; the boot that held it is fenced"
    TAKEN = "refused: the holder is there"
    FENCED = "refused: another one has taken its place"

    @property
    def is_refusal(self) -> bool:
        return self in (Verdict.TAKEN, Verdict.FENCED)


class Holder(Struct, frozen=True):
    """Who has the id now."""

    incarnation: Incarnation
    state: HiveState


def claim(claimant: Incarnation, holder: Holder | None, fenced: frozenset[str]) -> Verdict:
    """Decide who has an id when `claimant` announces itself with it.

    Args:
        holder: None where nobody has the id.
        fenced: boots that were replaced.
    """
    if claimant.boot in fenced:
        return Verdict.FENCED
    if holder is None:
        return Verdict.NEW
    held = holder.incarnation
    if held == claimant:
        return Verdict.KNOWN
    if held.url == claimant.url:
        return Verdict.RESTARTED
    is_there = holder.state in ("connecting", "online")
    if held.boot == claimant.boot:
        return Verdict.KNOWN if is_there else Verdict.MOVED
    return Verdict.TAKEN if is_there else Verdict.REPLACES
