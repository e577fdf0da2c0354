"""The `infer` job: what the engine gives, as events."""

from contextlib import aclosing

from rbee_contracts.errors import NotFound, RbeeError
from rbee_contracts.events import InferResult, TokenData
from rbee_contracts.operations import Infer
from rbee_job_server import JobContext
from rbee_worker.engine.base import Delta, Engine


class InferHandler:
    """Runs `infer` on one engine.

    Args:
        model: the one model name that is served here.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model

    async def __call__(self, op: Infer, context: JobContext) -> InferResult:
        if op.model != self._model:
            raise NotFound(f"This worker serves {self._model!r}, not {op.model!r}.", code="model_not_found")
        context.narrate("infer_start", f"Inference on {op.model} has started.")
        # The correlation id finds the request in the engine's log; the job id makes it unique.
        request_id = f"{context.correlation_id}-{context.job_id}"
        async with aclosing(self._engine.generate(request_id, op, context.job.trace)) as outputs:
            async for output in outputs:
                if isinstance(output, Delta):
                    context.emit_token(output.text, _token_data(output))
                else:
                    context.narrate("infer_complete", _summary(output), output)
                    return output
        raise RbeeError("The engine ended the request without a result.", code="engine_aborted")


def _token_data(delta: Delta) -> TokenData | None:
    if delta.choice == 0 and not delta.logprobs:
        return None
    return TokenData(choice=delta.choice, logprobs=list(delta.logprobs))


def _summary(result: InferResult) -> str:
    usage, timings = result.usage, result.timings
    return (
        f"{usage.completion_tokens} tokens ({result.finish_reason}), first after {timings.ttft_ms:.0f} ms, "
        f"{timings.tokens_per_second:.1f} tokens/s."
    )
