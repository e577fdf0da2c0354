"""One hive to a state folder: two would take up, and end, each other's workers."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StateInUse(Exception):
    """Another hive has the folder, or it cannot be used; the message says what to do."""


@contextmanager
def state_lock(folder: Path) -> Iterator[None]:
    """Hold a state folder for as long as the block runs. The kernel lets go of it however the hive ends.

    Raises:
        StateInUse: with one line for the person who started it.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise StateInUse(
            f"cannot write to the state folder {folder}: {exc.strerror}. Choose another --state-dir."
        ) from exc
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise StateInUse(
                f"another hive runs with the state folder {folder}. "
                "Stop it, or give this one another --hive-id or --state-dir."
            ) from exc
        yield
    finally:
        os.close(descriptor)
