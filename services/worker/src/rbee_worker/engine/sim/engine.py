"""The shell of the simulated engine: one timer per step, and a generator per request."""

import asyncio
import signal
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

import anyio
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from rbee_contracts.errors import InvalidRequest, Unavailable
from rbee_contracts.events import ChoiceEnd, InferResult, Timings, Usage
from rbee_contracts.nodes import EngineLoad
from rbee_contracts.operations import Infer
from rbee_contracts.trace import TraceContext
from rbee_worker import VERSION
from rbee_worker.engine.base import Delta, EngineDied, EngineInfo, EngineStartFailed
from rbee_worker.engine.pace import Pace
from rbee_worker.engine.sim.model import Emission, SimModel, SimSequence
from rbee_worker.engine.sim.parameters import SimParameters
from rbee_worker.engine.sim.text import Text, count_tokens, hash_prompt

# What needs real logits. Other sampling parameters are taken and change nothing.
_UNSUPPORTED = (
    "logprobs", "logit_bias", "bad_words", "allowed_token_ids", "structured_outputs", "repetition_detection",
    "thinking_token_budget", "extra_args", "logprob_token_ids",
)  # fmt: skip


class SimEngine:
    """A `SimModel` run against the event loop's clock.

    A step's timer ends the step for all its sequences at once: every request's tokens are there in the
    same iteration of the loop, and each waiting generator is resumed in the next.
    """

    def __init__(self, served_name: str, parameters: SimParameters) -> None:
        self.served_name = served_name
        self.model = SimModel(parameters)
        self._parameters = parameters
        self._requests: dict[SimSequence, _Request] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._step_ends = 0.0
        self._is_stalled = False
        self._is_asleep = False
        self._pace = Pace()
        self._death: asyncio.Future[str] | None = None
        self._app: Any = None

    async def start(self) -> EngineInfo:
        """Wait `start_s` seconds; see `Engine.start`."""
        await anyio.sleep(self._parameters.start_s)
        if self._parameters.fail_start:
            raise EngineStartFailed("the sim engine was told to fail its start")
        # Only now, so that reading a command line does not load a web framework.
        from rbee_worker.engine.sim.openai_app import build_app

        if self._parameters.ignore_sigterm:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._death = asyncio.get_running_loop().create_future()
        self._app = build_app(self)
        return EngineInfo(engine="sim", version=VERSION, max_model_len=self._parameters.max_model_len)

    async def died(self) -> str:
        """Wait for the injected crash; see `Engine.died`."""
        if self._death is None:
            raise Unavailable("the engine is not running")
        return await asyncio.shield(self._death)

    async def stop(self) -> None:
        """Stop stepping and end what runs, as if the engine had died; `died` does not return."""
        self._app = None
        self._death = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fail_all()

    def kill(self) -> None:
        """Nothing to do: the engine has no process besides this one."""

    @property
    def is_tracing(self) -> bool:
        """It makes no spans."""
        return False

    def metrics(self) -> Iterable[Metric]:
        """Tell under vLLM's names what this engine has of it."""
        from rbee_worker.engine.sim.openai_app import render_metrics

        return text_string_to_metric_families(render_metrics(self)) if self.is_alive else ()

    @property
    def http_app(self) -> Any:
        """A Starlette app with the chat completions route, /v1/models, /metrics and /health."""
        return self._app

    @property
    def is_alive(self) -> bool:
        return self._death is not None and not self._death.done()

    def load(self) -> EngineLoad:
        """Tell what runs and waits now, and the share of KV blocks that is reserved."""
        c, now = self.model.counters, asyncio.get_running_loop().time()
        return EngineLoad(
            running=len(self.model.running),
            waiting=len(self.model.waiting),
            kv_cache_usage=self.model.kv_cache_usage,
            tokens_per_second=self._pace.tokens_per_second(now),
            prefix_cache_hit_rate=round(c.prefix_hits / c.prefix_queries, 4) if c.prefix_queries else None,
            step_age_s=self._pace.step_age_s(now),
        )

    async def probe(self) -> None:
        """Generate one token; see `Engine.probe`."""
        async for _ in self.generate("rbee-probe", Infer(model=self.served_name, prompt=[0], max_tokens=1)):
            pass

    @property
    def can_sleep(self) -> bool:
        return self._parameters.sleep_mode

    async def sleep(self) -> None:
        """Take nothing until `wake`; see `Engine.sleep`."""
        self._is_asleep = True

    async def wake(self) -> None:
        self._is_asleep = False

    async def generate(
        self, request_id: str, op: Infer, trace: TraceContext | None = None
    ) -> AsyncGenerator[Delta | InferResult, None]:
        """Generate text; see `Engine.generate`. It makes no spans."""
        request = self.submit(op)
        try:
            while True:
                for item in await request.step():
                    yield item
                if request.is_finished:
                    return
        finally:
            self.abort(request)

    def submit(self, op: Infer) -> "_Request":
        """Check a request and queue it; its `step` then gives what each step puts out.

        Raises:
            InvalidRequest, EngineDied: as `generate`.
        """
        if self._death is None or self._is_asleep:
            raise Unavailable("the engine is not running")
        if self._death.done():
            raise EngineDied(self._death.result())
        request = _Request(self._sequences(op), asyncio.get_running_loop())
        for sequence in request.sequences:
            self._requests[sequence] = request
            self.model.add(sequence)
        if self._timer is None and not self._is_stalled:
            # Requests of the same loop iteration are in the same first step.
            loop = asyncio.get_running_loop()
            self._step_ends = loop.time()
            self._timer = loop.call_at(self._step_ends, self._begin_step)
        return request

    def abort(self, request: "_Request") -> None:
        """Take a request out of the engine. After its end this does nothing."""
        for sequence in request.sequences:
            if self._requests.pop(sequence, None) is not None:
                self.model.abort(sequence)

    def _sequences(self, op: Infer) -> list[SimSequence]:
        p = self._parameters
        unsupported = [name for name in _UNSUPPORTED if getattr(op, name) is not None]
        if unsupported:
            raise InvalidRequest(f"the sim engine has no {', '.join(unsupported)}")
        prompt: str | Sequence[int]
        prompt = _render(op.messages) if op.messages is not None else op.prompt or ""
        tokens = count_tokens(prompt)
        room = p.max_model_len - tokens
        if room < 1 or (op.max_tokens or 1) > room:
            wanted = "at least 1 output token" if op.max_tokens is None else f"max_tokens = {op.max_tokens}"
            raise InvalidRequest(
                f"prompt of {tokens} tokens and {wanted} do not fit the model's context of "
                f"{p.max_model_len} tokens",
                code="context_length_exceeded",
            )
        max_tokens = op.max_tokens or room
        if (op.min_tokens or 0) > max_tokens:
            raise InvalidRequest(f"min_tokens = {op.min_tokens} is more than max_tokens = {max_tokens}")
        if not op.ignore_eos:
            # Without ignore_eos an answer is no longer than this, so no more cache is reserved for it.
            max_tokens = min(max_tokens, max(p.eos_after_tokens, (op.min_tokens or 0) + 1))
        hashes, seed = hash_prompt(prompt, p.block_tokens)
        return [
            SimSequence(
                prompt_tokens=tokens,
                block_hashes=hashes,
                text=Text(
                    seed=seed + (op.seed or 0) + 7919 * choice,
                    max_tokens=max_tokens,
                    eos_after=None if op.ignore_eos else p.eos_after_tokens,
                    stop=[op.stop] if isinstance(op.stop, str) else op.stop or (),
                    keep_stop=bool(op.include_stop_str_in_output),
                    stop_token_ids=op.stop_token_ids or (),
                    min_tokens=op.min_tokens or 0,
                ),
            )
            for choice in range(op.n or 1)
        ]

    # --- the step loop ---------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        # A late timer does not slow the engine, which would not have waited for us; a loop that is more
        # than a step behind does not make it catch up in a burst either.
        now = loop.time()
        duration_s = self.model.plan(now)
        if duration_s is None:
            return
        begins = self._step_ends if now - self._step_ends < duration_s else now
        self._step_ends = begins + duration_s
        self._timer = loop.call_at(self._step_ends, self._end_step)

    def _end_step(self) -> None:
        p, counters = self._parameters, self.model.counters
        now = asyncio.get_running_loop().time()
        emissions = self.model.finish(now)
        self._pace.step(now, len(emissions))
        for emission in emissions:
            if emission.finish_reason is None:
                self._requests[emission.sequence].take(emission, now)
            else:
                self._requests.pop(emission.sequence).take(emission, now)
        if p.crash_after_tokens is not None and counters.generated >= p.crash_after_tokens:
            self._crash(f"the sim engine was told to die after {p.crash_after_tokens} tokens")
        elif p.stall_after_tokens is not None and counters.generated >= p.stall_after_tokens:
            self._is_stalled = True
            self._timer = None
        else:
            self._begin_step()

    def _crash(self, cause: str) -> None:
        self._timer = None
        if self._death is not None:
            self._death.set_result(cause)
        self._fail_all()

    def _fail_all(self) -> None:
        requests = set(self._requests.values())
        self._requests.clear()
        for request in requests:
            for sequence in request.sequences:
                self.model.abort(sequence)
            request.fail()


class _Request:
    """A request's mailbox: the steps put in, one reader takes out all there is."""

    def __init__(self, sequences: list[SimSequence], loop: asyncio.AbstractEventLoop) -> None:
        self.sequences = sequences
        self.is_finished = False
        self._loop = loop
        self._choices = {sequence: choice for choice, sequence in enumerate(sequences)}
        self._items: list[Delta | InferResult] = []
        self._ends: list[ChoiceEnd] = []
        self._waiter: asyncio.Future[None] | None = None
        self._has_failed = False
        self._submitted = loop.time()
        self._held_back: dict[int, list[int]] = {}

    async def step(self) -> list[Delta | InferResult]:
        """Give all that has come since the last call, at least one item.

        Raises:
            EngineDied: and all that came before has been given.
        """
        while not self._items:
            if self._has_failed:
                raise EngineDied("the engine has died")
            self._waiter = self._loop.create_future()
            await self._waiter
        items, self._items = self._items, []
        self.is_finished = isinstance(items[-1], InferResult)
        return items

    def take(self, emission: Emission, now: float) -> None:
        choice = self._choices[emission.sequence]
        if emission.text:
            held = self._held_back.pop(choice, ())
            self._items.append(Delta(text=emission.text, token_ids=(*held, emission.token_id), choice=choice))
        else:
            self._held_back.setdefault(choice, []).append(emission.token_id)
        if emission.finish_reason is not None:
            self._ends.append(
                ChoiceEnd(
                    choice=choice, finish_reason=emission.finish_reason, stop_reason=emission.stop_reason
                )
            )
            if len(self._ends) == len(self.sequences):
                self._items.append(self._result(now))
        if self._items:
            self._wake()

    def fail(self) -> None:
        self._has_failed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _result(self, now: float) -> InferResult:
        ends = sorted(self._ends, key=lambda end: end.choice)
        prompt = self.sequences[0].prompt_tokens
        completion = sum(s.generated for s in self.sequences)
        admitted = min((s.admitted_at for s in self.sequences if s.admitted_at is not None), default=now)
        first = min((s.prefilled_at for s in self.sequences if s.prefilled_at is not None), default=now)
        decode_s, decoded = now - first, completion - len(ends)
        return InferResult(
            usage=Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion),
            finish_reason=ends[0].finish_reason,
            stop_reason=ends[0].stop_reason,
            choices=ends if len(ends) > 1 else [],
            timings=Timings(
                queue_ms=round((admitted - self._submitted) * 1000, 3),
                prefill_ms=round((first - admitted) * 1000, 3),
                decode_ms=round(decode_s * 1000, 3),
                ttft_ms=round((first - self._submitted) * 1000, 3),
                tokens_per_second=round(decoded / decode_s, 2) if decode_s > 0 else 0.0,
            ),
        )


def _render(messages: list[dict[str, Any]]) -> str:
    """Write a conversation as text; a message's content is text or a list of text parts."""
    lines = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if not isinstance(role, str) or not isinstance(content, str):
            raise InvalidRequest(f"bad `messages`: number {number} has no role or no text content")
        lines.append(f"<|{role}|>{content}\n")
    return "".join(lines) + "<|assistant|>"
