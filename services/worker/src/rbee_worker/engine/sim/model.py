"""A model of one GPU engine's scheduler, step by step: no clock, no I/O, no event loop.

It is vLLM's V1 scheduler in what a caller notices: continuous batching with decodes first, chunked prefill
within a token budget, a paged KV cache with a prefix cache, first come first served. It differs in one
thing: a sequence is admitted only where its whole length would fit, so nothing is ever preempted.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from msgspec import Struct

from rbee_worker.engine.sim.parameters import SimParameters
from rbee_worker.engine.sim.text import Text


class SimSequence(Struct, kw_only=True, eq=False):
    """One sequence: what is asked, and how far it is."""

    prompt_tokens: int
    block_hashes: Sequence[bytes]
    text: Text
    computed: int = 0
    cached: int = 0
    generated: int = 0
    reserved_blocks: int = 0
    shared_blocks: int = 0
    admitted_at: float | None = None
    prefilled_at: float | None = None

    @property
    def is_prefilled(self) -> bool:
        return self.computed >= self.prompt_tokens


class Emission(Struct, frozen=True):
    """What one sequence put out in one step; `text` may be empty. `finish_reason` on the last."""

    sequence: SimSequence
    text: str
    token_id: int
    finish_reason: str | None
    stop_reason: int | str | None


class Counters(Struct, kw_only=True):
    """Totals since the start, in tokens."""

    prompt: int = 0
    generated: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class BlockCache:
    """The KV cache's accounting: blocks shared by hash, blocks of one sequence, idle ones kept for reuse."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._shared: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._private = 0

    @property
    def used(self) -> int:
        """Blocks that cannot be given to another sequence. Idle ones can, so they count as free."""
        return len(self._shared) + self._private

    def hits(self, hashes: Sequence[bytes]) -> int:
        """Count the leading blocks that are there already."""
        for count, block in enumerate(hashes):
            if block not in self._shared and block not in self._idle:
                return count
        return len(hashes)

    def reserve(self, hashes: Sequence[bytes], private: int) -> bool:
        """Take blocks for one sequence, evicting idle ones, least recently used first; False: no room."""
        new = sum(block not in self._shared for block in hashes)
        if self.used + new + private > self.blocks:
            return False
        for block in hashes:
            self._idle.pop(block, None)
            self._shared[block] = self._shared.get(block, 0) + 1
        self._private += private
        while self.used + len(self._idle) > self.blocks:
            self._idle.popitem(last=False)
        return True

    def release(self, hashes: Iterable[bytes], private: int, *, keep: bool) -> None:
        """Give a sequence's blocks back. `keep`: those shared by hash stay, idle, for the next."""
        self._private -= private
        for block in hashes:
            self._shared[block] -= 1
            if not self._shared[block]:
                del self._shared[block]
                if keep:
                    self._idle[block] = None


class SimModel:
    """The engine's state. `plan` begins a step and says how long it lasts; `finish` ends it."""

    def __init__(self, parameters: SimParameters) -> None:
        self.parameters = parameters
        self.counters = Counters()
        self.cache = BlockCache(parameters.kv_blocks)
        self.running: dict[int, SimSequence] = {}
        self.waiting: deque[SimSequence] = deque()
        self._stepping: list[SimSequence] = []

    def add(self, sequence: SimSequence) -> None:
        """Queue a sequence; it takes part from the next step on."""
        self.waiting.append(sequence)

    def abort(self, sequence: SimSequence) -> None:
        """Forget a sequence, wherever it is. Twice is harmless."""
        if self.running.pop(id(sequence), None) is not None:
            self._release(sequence)
        else:
            # A sequence that waits is equal only to itself, as eq is off.
            self.waiting = deque(s for s in self.waiting if s is not sequence)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache that running sequences hold, 0 to 1, their unwritten rest included."""
        return self.cache.used / self.cache.blocks

    def plan(self, now: float) -> float | None:
        """Begin a step at `now`; returns how many seconds it lasts, or None where there is nothing to do."""
        p = self.parameters
        decoding = sum(sequence.is_prefilled for sequence in self.running.values())
        budget = p.max_num_batched_tokens - decoding
        prefilled = 0
        for sequence in self.running.values():
            prefilled += self._prefill(sequence, budget - prefilled)
        while self.waiting and prefilled < budget and len(self.running) < p.max_num_seqs:
            if not self._admit(self.waiting[0], now):
                break
            prefilled += self._prefill(self.waiting.popleft(), budget - prefilled)
        # One whose prefill ends with this step gives its first token with it.
        self._stepping = [sequence for sequence in self.running.values() if sequence.is_prefilled]
        if not self._stepping and not prefilled:
            return None
        step_ms = p.step_ms + p.step_ms_per_seq * len(self._stepping)
        return step_ms / 1000 + prefilled / p.prefill_tokens_per_s

    def finish(self, now: float) -> list[Emission]:
        """End the step: one token for each sequence in it that was not aborted meanwhile."""
        emissions = []
        for sequence in self._stepping:
            if id(sequence) not in self.running:
                continue
            if sequence.prefilled_at is None:
                sequence.prefilled_at = now
            sequence.generated += 1
            self.counters.generated += 1
            text, token_id, finish_reason, stop_reason = sequence.text.next()
            emissions.append(Emission(sequence, text, token_id, finish_reason, stop_reason))
            if finish_reason is not None:
                del self.running[id(sequence)]
                self._release(sequence)
        self._stepping = []
        return emissions

    def _admit(self, sequence: SimSequence, now: float) -> bool:
        p = self.parameters
        caching = p.prefix_caching
        hashes = sequence.block_hashes if caching else ()
        # The last prompt token is always computed: its logits give the first output token.
        hits = min(self.cache.hits(hashes), (sequence.prompt_tokens - 1) // p.block_tokens)
        total = -(-(sequence.prompt_tokens + sequence.text.max_tokens) // p.block_tokens)
        if not self.cache.reserve(hashes, total - len(hashes)):
            return False
        sequence.shared_blocks = len(hashes)
        sequence.reserved_blocks = total - len(hashes)
        sequence.cached = sequence.computed = hits * p.block_tokens
        sequence.admitted_at = now
        self.running[id(sequence)] = sequence
        self.counters.prompt += sequence.prompt_tokens
        if caching:
            self.counters.prefix_queries += sequence.prompt_tokens
            self.counters.prefix_hits += sequence.cached
        return True

    def _prefill(self, sequence: SimSequence, budget: int) -> int:
        taken = min(budget, sequence.prompt_tokens - sequence.computed)
        sequence.computed += taken
        return taken

    def _release(self, sequence: SimSequence) -> None:
        hashes = sequence.block_hashes[: sequence.shared_blocks]
        self.cache.release(hashes, sequence.reserved_blocks, keep=sequence.is_prefilled)
