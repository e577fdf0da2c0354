"""What the simulated engine reads and writes: prompts as tokens and block hashes, and deterministic words."""

import hashlib
import struct
from collections.abc import Sequence

# English in a GPT-like tokenizer has about four characters a token.
CHARS_PER_TOKEN = 4
VOCABULARY = 1000

_WORDS = [f" tok{i}" for i in range(VOCABULARY)]
EOS = VOCABULARY

Next = tuple[str, int, str | None, int | str | None]


def count_tokens(prompt: str | Sequence[int]) -> int:
    """Count a prompt's tokens: every four characters of text are one; at least one."""
    return max(1, -(-len(prompt) // CHARS_PER_TOKEN)) if isinstance(prompt, str) else len(prompt)


def hash_prompt(prompt: str | Sequence[int], block_tokens: int) -> tuple[list[bytes], int]:
    """Give the hash of each full block of a prompt, each with all before it, and a seed for the answer."""
    running = hashlib.blake2b(digest_size=8)
    size = block_tokens * (CHARS_PER_TOKEN if isinstance(prompt, str) else 1)
    blocks: list[bytes] = []
    for start in range(0, len(prompt), size):
        part = prompt[start : start + size]
        running.update(
            part.encode("utf-8", "surrogatepass")
            if isinstance(part, str)
            else struct.pack(f"<{len(part)}q", *part)
        )
        if len(part) == size:
            blocks.append(running.digest())
    return blocks, int.from_bytes(running.digest(), "little")


class Text:
    """One answer: `next` gives its tokens one by one, and the reason to end with the last.

    Args:
        seed: the same seed gives the same words.
        max_tokens: the answer's length at most.
        eos_after: its length where nothing else ends it; None ignores it.
        stop: strings that end it, left out of it unless `keep_stop`.
        stop_token_ids: tokens that end it.
        min_tokens: no end by EOS or a stop before that many tokens.
    """

    __slots__ = (
        "_at",
        "_eos_after",
        "_hold",
        "_keep_stop",
        "_min_tokens",
        "_pending",
        "_seed",
        "_stop",
        "_stop_ids",
        "max_tokens",
    )  # fmt: skip

    def __init__(
        self,
        *,
        seed: int,
        max_tokens: int,
        eos_after: int | None = None,
        stop: Sequence[str] = (),
        keep_stop: bool = False,
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self.max_tokens = max_tokens
        self._seed = seed
        self._eos_after = None if eos_after is None else max(eos_after, min_tokens + 1)
        self._stop = tuple(stop)
        self._hold = max((len(s) for s in stop), default=1) - 1
        self._keep_stop = keep_stop
        self._stop_ids = frozenset(stop_token_ids)
        self._min_tokens = min_tokens
        self._pending = ""
        self._at = 0

    def next(self) -> Next:
        """Give (text, token id, finish reason, stop reason) of the next token."""
        self._at += 1
        if self._at == self._eos_after:
            return self._flush(), EOS, "stop", None
        token_id = (self._seed + self._at) % VOCABULARY
        word = _WORDS[token_id]
        reason = "length" if self._at >= self.max_tokens else None
        if token_id in self._stop_ids and self._at > self._min_tokens:
            return self._flush() + word, token_id, "stop", token_id
        if not self._stop:
            return word, token_id, reason, None
        self._pending += word
        if self._at > self._min_tokens and (found := self._find()) is not None:
            at, stop = found
            return self._pending[: at + len(stop) if self._keep_stop else at], token_id, "stop", stop
        if reason is not None:
            return self._flush(), token_id, reason, None
        cut = max(0, len(self._pending) - self._hold)
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text, token_id, None, None

    def _find(self) -> tuple[int, str] | None:
        return min(((at, s) for s in self._stop if (at := self._pending.find(s)) >= 0), default=None)

    def _flush(self) -> str:
        text, self._pending = self._pending, ""
        return text
