"""What the hive does for the operations on model files."""

import anyio.to_thread

from rbee_contracts.nodes import ModelDeleted, ModelInfo, ModelListResult
from rbee_contracts.operations import ModelDelete, ModelDownload, ModelGet, ModelList
from rbee_hive.models.catalogue import Models
from rbee_hive.models.downloads import Downloads
from rbee_hive.models.names import parse_model
from rbee_hive.models.space import readable
from rbee_hive.models.transfer import Want
from rbee_job_server import Handlers, JobContext


class ModelHandlers:
    """Executes the operations on model files. Loading and unloading are the workers'."""

    def __init__(self, models: Models, downloads: Downloads) -> None:
        self._models = models
        self._downloads = downloads

    def table(self) -> Handlers:
        return {
            ModelDownload: self.model_download,
            ModelDelete: self.model_delete,
            ModelList: self.model_list,
            ModelGet: self.model_get,
        }

    async def model_list(self, _: ModelList, __: JobContext) -> ModelListResult:
        return ModelListResult(models=await self._models.listed())

    async def model_get(self, op: ModelGet, _: JobContext) -> ModelInfo:
        return await self._models.described(op.model)

    async def model_download(self, op: ModelDownload, context: JobContext) -> ModelInfo:
        """Have a model in the models folder. A revision has an id, and a folder, of its own."""
        want = Want(
            name=parse_model(op.model, op.revision),
            patterns=tuple(op.allow_patterns) if op.allow_patterns is not None else None,
            source=op.source,
        )
        outcome = await self._downloads.fetch(want, context.narrate)
        info = await self._models.described(want.name.id)
        context.narrate(
            "model_download_complete",
            f"{info.model} lies in the models folder: {info.files} files, {readable(info.size_on_disk)}.",
            model=info.model,
            revision=info.revision,
            files=info.files,
            size=info.size_on_disk,
            source=outcome.source,
            fetched_bytes=outcome.fetched_bytes,
        )
        return info

    async def model_delete(self, op: ModelDelete, context: JobContext) -> ModelDeleted:
        """Delete a model, and what an unfinished download of it has left."""
        self._downloads.refuse_running(op.model)
        if await anyio.to_thread.run_sync(
            self._models.lookup, op.model
        ) is None and self._downloads.has_partial(op.model):
            freed = await self._downloads.delete_partial(op.model)
            context.narrate("model_delete_complete", f"The unfinished download of {op.model} is deleted.")
            return ModelDeleted(model=op.model, freed=freed)
        entry = await anyio.to_thread.run_sync(self._models.entry, op.model)
        # From here to the rename nothing else runs on this loop.
        self._downloads.refuse_running(op.model)
        self._models.refuse_used(op.model, "deleted")
        _, freed = self._models.discard(entry)
        context.narrate("model_delete_start", f"{op.model} is no longer listed; deleting its files.")
        await anyio.to_thread.run_sync(self._models.empty_trash)
        freed += await self._downloads.delete_partial(op.model)
        context.narrate("model_delete_complete", f"{op.model} is deleted: {readable(freed)} are free again.")
        return ModelDeleted(model=op.model, freed=freed)
