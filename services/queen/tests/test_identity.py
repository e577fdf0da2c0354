"""Who holds a hive's id, for any order of announcements."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_contracts.nodes import HiveState
from rbee_queen.fleet.identity import Holder, Incarnation, Verdict, claim

A = Incarnation("http://a:1", "b1")
AGAIN = Incarnation("http://a:1", "b2")
MOVED = Incarnation("http://b:1", "b1")
OTHER = Incarnation("http://b:1", "b3")


@pytest.mark.parametrize(
    ("claimant", "state", "verdict"),
    [
        (A, "online", Verdict.KNOWN),
        (A, "lost", Verdict.KNOWN),
        (AGAIN, "online", Verdict.RESTARTED),
        (AGAIN, "unreachable", Verdict.RESTARTED),
        (MOVED, "online", Verdict.KNOWN),
        (MOVED, "unreachable", Verdict.MOVED),
        (OTHER, "online", Verdict.TAKEN),
        (OTHER, "connecting", Verdict.TAKEN),
        (OTHER, "unreachable", Verdict.REPLACES),
        (OTHER, "lost", Verdict.REPLACES),
    ],
)
def test_each_case(claimant: Incarnation, state: HiveState, verdict: Verdict) -> None:
    assert claim(claimant, Holder(A, state), frozenset()) is verdict
    assert claim(claimant, None, frozenset()) is Verdict.NEW
    assert claim(claimant, Holder(A, state), frozenset({claimant.boot})) is Verdict.FENCED


incarnations = st.builds(
    Incarnation, st.sampled_from(["http://a:1", "http://b:1", "http://c:1"]), st.sampled_from("1234")
)
states: st.SearchStrategy[HiveState] = st.sampled_from(["connecting", "online", "unreachable", "lost"])


@settings(deadline=None)
@given(st.lists(st.tuples(incarnations, states), max_size=40))
def test_an_id_never_goes_back_to_a_boot_that_was_replaced_nor_away_from_a_hive_that_is_there(
    announcements: list[tuple[Incarnation, HiveState]],
) -> None:
    holder: Incarnation | None = None
    fenced: set[str] = set()
    for claimant, state in announcements:
        verdict = claim(claimant, Holder(holder, state) if holder else None, frozenset(fenced))
        before = holder
        if verdict in (Verdict.NEW, Verdict.MOVED, Verdict.REPLACES, Verdict.RESTARTED):
            holder = claimant
        if verdict is Verdict.REPLACES and before is not None:
            fenced.add(before.boot)
        assert holder is not None
        assert holder.boot not in fenced
        if before is not None and state in ("connecting", "online"):
            assert holder.url == before.url
        # The same announcement again changes nothing.
        assert verdict.is_refusal or claim(claimant, Holder(holder, "online"), frozenset(fenced)) in (
            Verdict.KNOWN,
        )
