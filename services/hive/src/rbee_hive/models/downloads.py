"""The hive's downloads: one transfer for all who ask for the same, each with a stream of its own."""

from typing import Any, Protocol

import anyio
import anyio.lowlevel
import anyio.to_thread
import structlog
from anyio.abc import TaskGroup
from msgspec import Struct

from rbee_contracts.errors import Conflict, RbeeError, Unavailable
from rbee_contracts.events import DownloadProgress
from rbee_hive.models.catalogue import Models
from rbee_hive.models.hub import HubAccess
from rbee_hive.models.source import NoPeers, Peers
from rbee_hive.models.space import readable
from rbee_hive.models.staging import Staging
from rbee_hive.models.transfer import Outcome, Places, Transfer, Want

log = structlog.get_logger(__name__)

PROGRESS_EVERY_S = 1 / 3
"""With the one at the end, at most four in any second."""

STILL_EVERY_S = 5.0
"""How often progress is told while no byte comes."""


class Narrate(Protocol):
    """How a watcher is told: as `JobContext.narrate`."""

    def __call__(self, action: str, message: str, data: Struct | None = None, **facts: Any) -> None: ...


class Downloads:
    """Owns the transfers. `run` must be running; it owns their tasks.

    Args:
        models: where they go.
        hub: where the hub is.
        peers: knows which other hives have a model; by default none has.
        token: the cluster's, for other hives.
    """

    def __init__(
        self,
        models: Models,
        hub: HubAccess | None = None,
        *,
        peers: Peers | None = None,
        token: str | None = None,
    ) -> None:
        self._models = models
        self._staging = Staging(models.root)
        self._places = Places(
            models=models,
            staging=self._staging,
            hub=hub or HubAccess(),
            peers=peers or NoPeers(),
            token=token,
        )
        self.started = anyio.Event()
        """Set once what an earlier run has left is cleaned up."""
        self._transfers: dict[str, Transfer] = {}
        self._received_before = 0
        """Bytes of transfers that have ended."""
        self._tasks: TaskGroup | None = None

    async def run(self) -> None:
        """Clean up after an earlier run, then own the tasks of transfers and of sums, until cancelled."""
        async with anyio.create_task_group() as tasks:
            published = await anyio.to_thread.run_sync(self._clean)
            for model in published:
                log.info("download_published", model=model, reason="it was whole when the hive ended")
            self._tasks = tasks
            self.started.set()
            tasks.start_soon(self._models.compute_sums)
            await anyio.sleep_forever()

    def _clean(self) -> list[str]:
        self._models.empty_trash()
        published = self._staging.clean()
        self._models.changed()
        return published

    @property
    def received_bytes(self) -> int:
        """Bytes that have come over the network, of all transfers of this hive's life."""
        return self._received_before + sum(each.bytes_received for each in self._transfers.values())

    @property
    def running(self) -> int:
        """Transfers that are under way."""
        return len(self._transfers)

    def is_running(self, model: str) -> bool:
        return model in self._transfers

    async def fetch(self, want: Want, narrate: Narrate) -> Outcome:
        """Have a model here, narrating; join the transfer that brings it where there is one.

        Cancelled, it leaves the transfer, and the last one to leave stops it. What has come is kept.

        Raises:
            RbeeError: it cannot be had; says why, and what to do.
        """
        transfer, is_joined = await self._join(want, narrate)
        seen = transfer.noted if is_joined else 0
        transfer.watchers += 1
        try:
            narrate(
                "model_download_start",
                f"Download of {transfer.model} has been going on already; this job watches it."
                if is_joined
                else f"Download of {transfer.model} has begun.",
                model=transfer.model,
                revision=want.name.revision,
                source=want.source,
                joined=is_joined,
            )
            await self._watch(transfer, seen, narrate)
        finally:
            transfer.watchers -= 1
            if transfer.watchers == 0 and not transfer.finished.is_set():
                transfer.stop()
        if transfer.error is not None:
            raise _again(transfer.error)
        if transfer.outcome is None:
            raise Unavailable("The download was stopped; what has come is kept.", code="download_stopped")
        return transfer.outcome

    async def _join(self, want: Want, narrate: Narrate) -> tuple[Transfer, bool]:
        """Give the transfer to watch, and whether others watch it too."""
        await self.started.wait()
        while (transfer := self._transfers.get(want.name.id)) is not None:
            if transfer.want == want and not transfer.is_stopping:
                return transfer, True
            if not transfer.is_stopping:
                narrate(
                    "model_download_wait",
                    f"Another download of {want.name.id}, with other options, is going on; this one is next.",
                )
            await transfer.finished.wait()
            await anyio.lowlevel.checkpoint()
        assert self._tasks is not None
        transfer = Transfer(want, self._places)
        self._transfers[transfer.model] = transfer
        self._tasks.start_soon(self._run, transfer)
        return transfer, False

    async def _run(self, transfer: Transfer) -> None:
        # The first job's task started this one; its ids are not the transfer's.
        structlog.contextvars.clear_contextvars()
        try:
            await transfer.run()
        finally:
            del self._transfers[transfer.model]
            self._received_before += transfer.bytes_received

    async def _watch(self, transfer: Transfer, seen: int, narrate: Narrate) -> None:
        """Narrate a transfer until it has ended."""
        told: DownloadProgress | None = None
        told_at = 0.0
        while True:
            with anyio.move_on_after(PROGRESS_EVERY_S):
                await transfer.finished.wait()
            for number, action, message in list(transfer.notes):
                if number > seen:
                    seen = number
                    narrate(action, message)
            now = anyio.current_time()
            progress = transfer.progress(now)
            if progress is not None and (
                told is None
                or (progress.bytes_done, progress.files_done) != (told.bytes_done, told.files_done)
                or now - told_at >= STILL_EVERY_S
            ):
                told, told_at = progress, now
                narrate("model_download_progress", _text(progress), progress)
            if transfer.finished.is_set():
                return

    async def delete_partial(self, model: str) -> int:
        """Delete what an unfinished download of a model has left; give its bytes.

        Raises:
            Conflict: the download is going on.
        """
        self.refuse_running(model)
        folder = self._staging.folder(model)
        if not folder.path.is_dir():
            return 0
        await anyio.to_thread.run_sync(folder.acquire)
        try:
            size = folder.bytes_here()
            await anyio.to_thread.run_sync(folder.remove)
        finally:
            folder.release()
        return size

    def has_partial(self, model: str) -> bool:
        return self._staging.folder(model).path.is_dir()

    def refuse_running(self, model: str) -> None:
        """Refuse to touch a model that is being downloaded.

        Raises:
            Conflict: it is.
        """
        if self.is_running(model):
            raise Conflict(
                f"{model} is being downloaded. Cancel that job first: rbee job list",
                code="download_running",
            )


def _again(error: RbeeError) -> RbeeError:
    """Give each watcher an error of its own: an exception that is raised twice gathers both tracebacks."""
    fresh = type(error)(error.details, code=error.code, title=error.error, retryable=error.retryable)
    fresh.__cause__ = error
    return fresh


def _text(progress: DownloadProgress) -> str:
    share = ""
    if progress.bytes_total:
        share = (
            f" of {readable(progress.bytes_total)} ({100 * progress.bytes_done / progress.bytes_total:.0f} %)"
        )
    eta = f", {progress.eta_s:.0f} s to go" if progress.eta_s else ""
    rate = f", {readable(progress.rate)}/s" if progress.rate else ""
    return f"{progress.model}: {readable(progress.bytes_done)}{share}{rate}{eta}"
