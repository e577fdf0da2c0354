"""Event ids of streams: `<n>-<i>` on a job's stream, `<boot>-<seq>` on the firehose."""

import re
from typing import NamedTuple

_event_id = re.compile(r"([0-9]{1,15})-([0-9]{1,15})").fullmatch
_firehose_id = re.compile(r"([0-9a-f]{1,32})-([0-9]{1,15})").fullmatch


class Position(NamedTuple):
    """A place in a job's stream: narration events and output items so far."""

    narrations: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.narrations}-{self.outputs}"


START = Position(0, 0)


def parse_event_id(text: str) -> Position:
    """Parse `<n>-<i>`.

    Raises:
        ValueError: it has another form.
    """
    match = _event_id(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not of the form <n>-<i>")
    return Position(int(match[1]), int(match[2]))


def parse_firehose_id(text: str) -> tuple[str, int]:
    """Parse `<boot>-<seq>`.

    Raises:
        ValueError: it has another form.
    """
    match = _firehose_id(text)
    if match is None:
        raise ValueError(f"{text[:60]!r} is not of the form <boot>-<seq>")
    return match[1], int(match[2])
