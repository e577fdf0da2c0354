"""What went wrong, in one line, found in the log of a worker that has ended. Pure."""

import re
from collections.abc import Sequence

import msgspec

MAX_CHARS = 500

_EXCEPTION = re.compile(
    r"(?:^|[\s\]])((?:[A-Za-z_]\w*\.)*[A-Za-z_]*(?:Error|Exception|Interrupt|Exit)): (\S.*)$"
)
# vLLM's front end says no more than that its core did not come up; the core has said why, further up.
_WRAPPERS = re.compile(
    r"[Ee]ngine core initialization failed|See root cause above|EngineCore failed to start|"
    r"EngineDeadError|WorkerProc initialization failed"
)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|Free memory on device .* is less than|No available memory for the cache"
)
_CAUSES = ("service_failed", "engine_died", "loop_crashed")


def root_cause(lines: Sequence[str]) -> str | None:
    """Give the line that says best why a process ended; None where the log says nothing.

    rbee's own line names the cause, unless that only points further up: then it is the last exception above
    that is more than "the engine did not start".
    """
    own = _own_cause(lines)
    if own is not None and not _WRAPPERS.search(own):
        return _short(own)
    for line in reversed(lines):
        if line.startswith("{"):
            continue
        found = _EXCEPTION.search(line)
        if found is not None and not _WRAPPERS.search(line):
            return _short(f"{found[1].rpartition('.')[2]}: {found[2]}")
    return None if own is None else _short(own)


def is_out_of_memory(cause: str) -> bool:
    """Whether a cause is that a device's memory was not enough."""
    return _OUT_OF_MEMORY.search(cause) is not None


def _own_cause(lines: Sequence[str]) -> str | None:
    for line in reversed(lines):
        if not line.startswith("{"):
            continue
        try:
            said = msgspec.json.decode(line)
        except (msgspec.MsgspecError, RecursionError):
            continue
        if isinstance(said, dict) and said.get("event") in _CAUSES and isinstance(said.get("cause"), str):
            return str(said["cause"])
    return None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"
