"""What comes out of vLLM, put into our words: a request's outputs and the scheduler's numbers.

Takes vLLM's objects as they are and imports nothing of it.
"""

import math
import time
from typing import Any

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import ChoiceEnd, InferResult, Timings, TokenLogprob, Usage
from rbee_contracts.nodes import EngineLoad
from rbee_worker.engine.base import Delta
from rbee_worker.engine.pace import Pace

# JSON has no infinity; vLLM's own server gives this for an impossible token.
_LOWEST_LOGPROB = -9999.0


class Run:
    """What one request has put out so far."""

    def __init__(self, prompt_tokens: int) -> None:
        self.is_finished = False
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._held_back: dict[int, list[int]] = {}
        self._ends: dict[int, ChoiceEnd] = {}
        self._metrics: Any = None
        self._submitted = self._last = time.monotonic()
        self._first: float | None = None

    @property
    def is_new(self) -> bool:
        return self._first is None

    def take(self, output: Any) -> list[Delta]:
        """Take in one output of vLLM (one engine step, or several where we were slow)."""
        self._last = time.monotonic()
        if self._first is None:
            self._first = self._last
        deltas: list[Delta] = []
        for choice in output.outputs:
            index, token_ids = choice.index, choice.token_ids
            self._completion_tokens += len(token_ids)
            if choice.text or choice.logprobs:
                if held := self._held_back.pop(index, None):
                    token_ids = (*held, *token_ids)
                logprobs = tuple(_candidates(c) for c in choice.logprobs) if choice.logprobs else ()
                deltas.append(
                    Delta(text=choice.text, token_ids=tuple(token_ids), choice=index, logprobs=logprobs)
                )
            elif token_ids:
                self._held_back.setdefault(index, []).extend(token_ids)
            if choice.finish_reason is not None:
                if choice.finish_reason == "error":
                    raise RbeeError("the engine failed this request", code="engine_error", retryable=True)
                self._ends[index] = ChoiceEnd(
                    choice=index, finish_reason=choice.finish_reason, stop_reason=choice.stop_reason
                )
        if output.finished:
            self.is_finished = True
            self._metrics = output.metrics
            self._prompt_tokens = len(output.prompt_token_ids or ()) or self._prompt_tokens
        return deltas

    def result(self) -> InferResult:
        ends = [self._ends[index] for index in sorted(self._ends)]
        return InferResult(
            usage=Usage(
                prompt_tokens=self._prompt_tokens,
                completion_tokens=self._completion_tokens,
                total_tokens=self._prompt_tokens + self._completion_tokens,
            ),
            finish_reason=ends[0].finish_reason,
            stop_reason=ends[0].stop_reason,
            choices=ends if len(ends) > 1 else [],
            timings=self._timings(len(ends)),
        )

    def _timings(self, choices: int) -> Timings:
        """Give vLLM's own times where it keeps them (of the last choice to end), else ours."""
        m = self._metrics
        first = self._first or self._last
        if m is not None and m.scheduled_ts > 0 and m.first_token_ts > 0:
            queue_s, prefill_s = m.scheduled_ts - m.queued_ts, m.first_token_ts - m.scheduled_ts
            decode_s, ttft_s = m.last_token_ts - m.first_token_ts, m.first_token_latency
        else:
            queue_s, prefill_s = 0.0, first - self._submitted
            decode_s, ttft_s = self._last - first, first - self._submitted
        decoded = self._completion_tokens - choices
        return Timings(
            queue_ms=_ms(queue_s),
            prefill_ms=_ms(prefill_s),
            decode_ms=_ms(decode_s),
            ttft_ms=_ms(ttft_s),
            tokens_per_second=round(decoded / decode_s, 2) if decode_s > 0 and decoded > 0 else 0.0,
        )


class LoadRecorder:
    """A stat logger, as vLLM calls it, that keeps the last step's numbers of each engine."""

    def __init__(self) -> None:
        self._last: dict[int, EngineLoad] = {}
        self._pace = Pace()
        self._prefix_queries = 0
        self._prefix_hits = 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self._last[engine_idx] = EngineLoad(
                running=scheduler_stats.num_running_reqs,
                waiting=scheduler_stats.num_waiting_reqs
                + getattr(scheduler_stats, "num_skipped_waiting_reqs", 0),
                kv_cache_usage=scheduler_stats.kv_cache_usage,
            )
            prefix = getattr(scheduler_stats, "prefix_cache_stats", None)
            if prefix is not None:
                self._prefix_queries += prefix.queries
                self._prefix_hits += prefix.hits
        self._pace.step(time.monotonic(), getattr(iteration_stats, "num_generation_tokens", 0))

    def stepped(self) -> None:
        """Note a step that is known by its output: with `--disable-log-stats` nothing is recorded."""
        self._pace.step(time.monotonic(), 0)

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...

    def record_sleep_state(self, *_: Any) -> None: ...

    def record_admission_rejection(self, *_: Any) -> None: ...

    def total(self) -> EngineLoad:
        engines, now = self._last.values(), time.monotonic()
        return EngineLoad(
            running=sum(e.running for e in engines),
            waiting=sum(e.waiting for e in engines),
            kv_cache_usage=sum(e.kv_cache_usage for e in engines) / max(1, len(engines)),
            tokens_per_second=self._pace.tokens_per_second(now),
            prefix_cache_hit_rate=(
                round(self._prefix_hits / self._prefix_queries, 4) if self._prefix_queries else None
            ),
            step_age_s=self._pace.step_age_s(now),
        )


def _candidates(position: dict[int, Any]) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            token_id=token_id, token=c.decoded_token or "", logprob=max(float(c.logprob), _LOWEST_LOGPROB)
        )
        for token_id, c in position.items()
        if not math.isnan(c.logprob)
    ]


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)
