"""The seam between the worker and what generates text: the `Engine` protocol and its values."""

from collections.abc import AsyncGenerator, Iterable
from typing import Any, Protocol

from msgspec import Struct
from prometheus_client.metrics_core import Metric

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import InferResult, TokenLogprob
from rbee_contracts.nodes import EngineLoad
from rbee_contracts.operations import Infer
from rbee_contracts.trace import TraceContext


class EngineDied(RbeeError):
    """The engine is gone; nothing more comes from it and the worker must exit."""

    title = "Engine died"
    default_code = "engine_died"


class EngineStartFailed(RbeeError):
    """The engine could not be started with this model and these arguments; nothing of it is left."""

    title = "Engine start failed"
    default_code = "engine_start_failed"


class Delta(Struct, frozen=True, kw_only=True):
    """New output of one choice in one engine step.

    `token_ids` are the tokens since the choice's last Delta: a step whose text is held back (for a stop
    string, or in the middle of a UTF-8 sequence) gives no Delta unless it has logprobs. `logprobs` has
    one list per token, the sampled token first; `text` may then be empty.
    """

    text: str
    token_ids: tuple[int, ...]
    choice: int = 0
    logprobs: tuple[list[TokenLogprob], ...] = ()


class EngineInfo(Struct, frozen=True, kw_only=True):
    """What was loaded. `max_model_len`: the context, in tokens, prompt and output together."""

    engine: str
    version: str
    max_model_len: int


class Engine(Protocol):
    """One loaded model that generates text for many requests at once."""

    async def start(self) -> EngineInfo:
        """Load the model and generate one token; return once that has worked. Called once.

        Does not block the event loop. Cancelling it while it loads ends every process it has started.

        Raises:
            InvalidRequest: the engine's arguments are wrong; the message is one line.
            EngineStartFailed: the model could not be loaded.
        """

    def generate(
        self, request_id: str, op: Infer, trace: TraceContext | None = None
    ) -> AsyncGenerator[Delta | InferResult, None]:
        """Generate: one `Delta` per choice and engine step with new text, then one `InferResult`, last.

        All of one step's Deltas come in one iteration of the event loop. Closing or cancelling the
        generator aborts the request in the engine. `request_id` need not be unique to the engine. An engine
        that traces makes its spans below `trace`.

        Raises:
            InvalidRequest: the request cannot run on this model (code `context_length_exceeded` where it
                does not fit the context); raised before the engine has been given anything.
            NoCapacity: the engine's own queue is full.
            EngineDied: the engine has died.
        """

    def load(self) -> EngineLoad:
        """Tell what the engine is doing, from its last step."""

    async def probe(self) -> None:
        """Have the engine generate one token; an engine that does not generate text says that it is well.

        Raises:
            RbeeError: it cannot. One that hangs hangs this too: the caller has a deadline.
        """

    @property
    def can_sleep(self) -> bool:
        """Whether it can give its device memory back and keep its process."""

    async def sleep(self) -> None:
        """Give the device memory back; nothing may run. Weights are kept in the machine's memory."""

    async def wake(self) -> None:
        """Take the device memory again; requests may come once it has returned."""

    async def died(self) -> str:
        """Wait until the engine has died by itself and return the cause; cancelled on a stop.

        Returns within 0.3 s of the death, also when the engine was idle.
        """

    async def stop(self) -> None:
        """End the engine and every process of it, within seconds. Never raises; safe to call again."""

    def kill(self) -> None:
        """End every process of the engine at once: its own process is about to end. Never blocks."""

    @property
    def is_tracing(self) -> bool:
        """Whether it makes spans, and so needs to know the trace that they belong to."""

    def metrics(self) -> Iterable[Metric]:
        """Give what the engine counts and measures, under vLLM's names; nothing before it has loaded.

        Called on the event loop: it must be quick.
        """

    @property
    def http_app(self) -> Any:
        """The engine's own ASGI app (OpenAI routes, /metrics), or None; there once `start` returned."""
