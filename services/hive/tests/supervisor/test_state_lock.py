"""One hive to a state folder."""

from pathlib import Path

import pytest

from rbee_hive.supervisor.state_lock import StateInUse, state_lock


def test_a_folder_is_one_hives_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "state"
    with state_lock(folder), pytest.raises(StateInUse, match="another hive runs"), state_lock(folder):
        pass
    with state_lock(folder):
        pass


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateInUse, match="--state-dir"), state_lock(tmp_path / "file" / "state"):
        pass
