"""What the queen does with an `openai` operation: find out which model is meant, and have it run there."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec

from rbee_contracts.errors import InvalidRequest, NotFound
from rbee_contracts.events import InferSchedule, OpenAIResult
from rbee_contracts.nodes import HiveInfo
from rbee_contracts.operations import OpenAI
from rbee_job_server import JobContext
from rbee_queen.openai.aliases import Aliases
from rbee_queen.openai.models import is_known, list_models, not_found, serving

Place: TypeAlias = Callable[[OpenAI, JobContext], Awaitable[Any]]


class OpenAIJobs:
    """Executes `openai`.

    Args:
        place: decides where a request runs, and runs it there.
        hives: gives the hives as they are now.
        settled: waits a moment until hives that were only just met have been heard.
    """

    def __init__(
        self,
        place: Place,
        hives: Callable[[], list[HiveInfo]],
        aliases: Aliases,
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self._place = place
        self._hives = hives
        self._aliases = aliases
        self._settled = settled

    async def __call__(self, op: OpenAI, context: JobContext) -> OpenAIResult:
        """Run a request on a worker of its model.

        Raises:
            NotFound: the model neither runs nor lies anywhere.
            InvalidRequest: it names no model, and not just one is served.
        """
        op = self._aliases.resolve(op)
        placed = context.job.earlier(InferSchedule)
        if placed is None:
            op = await self._addressed(op)
        else:  # before a restart: it goes on where it is, whichever hives have been heard since
            op = msgspec.structs.replace(op, model=placed.data.model)
        result = await self._place(op, context)
        done = msgspec.convert(result, OpenAIResult)
        context.job.usage = done.usage
        return done

    async def _addressed(self, op: OpenAI) -> OpenAI:
        if not self._names_one(op):
            await self._settled()
        hives = self._hives()
        if op.model is None:
            served = serving(hives)
            if len(served) != 1:
                raise InvalidRequest(
                    f"The body must name a `model`; served now: {', '.join(served) or 'none'}.",
                    code="model_required",
                )
            return msgspec.structs.replace(op, model=served[0])
        if hives and not is_known(op.model, hives):
            models = list_models(hives, self._aliases)
            raise NotFound(not_found(op.model, models), code="model_not_found", title="Model not found")
        return op

    def _names_one(self, op: OpenAI) -> bool:
        """Whether it is clear now which model is meant."""
        hives = self._hives()
        return len(serving(hives)) == 1 if op.model is None else is_known(op.model, hives)
