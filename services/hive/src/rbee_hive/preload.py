"""The models that a hive loads by itself at its start: a job for each, as if somebody had asked for it."""

from collections.abc import Callable, Iterable, Sequence

import anyio
import structlog

from rbee_contracts.errors import RbeeError
from rbee_contracts.ids import new_correlation_id
from rbee_contracts.nodes import WorkerInfo
from rbee_contracts.operations import ModelLoad
from rbee_job_server import JobServer, Submission
from rbee_job_server.jobs import Job

log = structlog.get_logger(__name__)

LOADED = ("ready", "busy", "sleeping")

COMING = (*LOADED, "starting")


class Preload:
    """Loads models, and knows which of them have not been there yet.

    Args:
        models: those to load; none is fetched from the hub.
        workers: gives the hive's workers as they are now.
    """

    def __init__(
        self, models: Sequence[str], server: JobServer, workers: Callable[[], Iterable[WorkerInfo]]
    ) -> None:
        self._missing = list(dict.fromkeys(models))
        self._server = server
        self._workers = workers
        self._jobs: dict[str, Job] = {}
        self._refused: dict[str, str] = {}

    def not_ready(self) -> str | None:
        """Say which model is not there yet, and why; None once each has been, whatever becomes of it."""
        there = {worker.model for worker in self._workers() if worker.state in LOADED}
        self._missing = [model for model in self._missing if model not in there]
        if not self._missing:
            return None
        model = self._missing[0]
        job = self._jobs.get(model)
        error = None if job is None else job.record().error
        why = self._refused.get(model) if error is None else error.message.partition("\n")[0]
        if why is not None:
            return f"{model} could not be loaded: {why} When that is mended: rbee model load {model}"
        return f"{model} is being loaded"

    async def run(self) -> None:
        """Have every model loaded, all at once; goes on for ever, as the hive's loops do.

        A model that a worker of the hive before is still loading is left to that worker.
        """
        coming = {worker.model for worker in self._workers() if worker.state in COMING}
        for model in self._missing:
            if model in coming:
                continue
            try:
                self._jobs[model] = self._server.submit(
                    Submission(
                        operation=ModelLoad(model=model),
                        correlation_id=new_correlation_id(),
                        respond_async=True,
                    )
                )
            except RbeeError as exc:
                self._refused[model] = exc.details
                log.error("preload_refused", model=model, cause=exc.details)
        await anyio.sleep_forever()
