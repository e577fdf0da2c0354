"""The hive's downloads in this process, against a hub on this machine."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import msgspec
from hub_server import Hub
from msgspec import Struct

from rbee_contracts.events import DownloadProgress
from rbee_hive.models import Downloads, HubAccess, Models, Patience, Peers
from rbee_hive.models.names import parse_model
from rbee_hive.models.transfer import Outcome, SourceChoice, Want

IMPATIENT = Patience(
    connect_s=60,
    read_s=60,
    list_s=60,
    list_attempts=3,
    file_attempts=3,
    backoff_first_s=0.01,
    backoff_max_s=0.02,
    retry_after_max_s=5,
)
"""Tries again at once. It waits long for every answer: whoever gives it may be stopped on a busy machine."""


class Told:
    """What one watcher was told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, Any]] = []

    def __call__(self, action: str, message: str, data: Struct | None = None, **facts: Any) -> None:
        self.events.append((action, message, data if data is not None else facts))

    def actions(self) -> list[str]:
        return [action for action, _, _ in self.events]

    def text(self) -> str:
        return "\n".join(message for _, message, _ in self.events)

    def progress(self) -> list[DownloadProgress]:
        return [data for _, _, data in self.events if isinstance(data, DownloadProgress)]


class Store:
    """Models and their downloads, with what each call was told."""

    def __init__(self, models: Models, downloads: Downloads) -> None:
        self.models = models
        self.downloads = downloads

    async def fetch(
        self,
        model: str,
        told: Told | None = None,
        *,
        revision: str | None = None,
        patterns: Sequence[str] | None = None,
        source: SourceChoice = "auto",
    ) -> Outcome:
        want = Want(
            name=parse_model(model, revision),
            patterns=None if patterns is None else tuple(patterns),
            source=source,
        )
        return await self.downloads.fetch(want, told or Told())

    def listed(self) -> list[str]:
        return [info.model for info in self.models.find()]

    def staged(self, model: str = "org/tiny") -> list[str]:
        """Give the names of what lies in a model's staging."""
        folder = self.downloads._staging.folder(model).path
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def partial_size(self, model: str = "org/tiny") -> int:
        """Give the bytes of the largest file that is still coming; one that is whole meanwhile is none."""
        size = 0
        with suppress(FileNotFoundError):
            for path in self.downloads._staging.folder(model).path.iterdir():
                with suppress(FileNotFoundError):
                    size = max(size, path.stat().st_size if path.suffix == ".part" else 0)
        return size


@asynccontextmanager
async def running_store(
    folder: Path,
    hub: Hub | None = None,
    *,
    patience: Patience = IMPATIENT,
    token: str | None = None,
    cluster_token: str | None = None,
    peers: Peers | None = None,
    users: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> AsyncIterator[Store]:
    """Run downloads into `folder`/models."""
    models = Models(folder / "models", state_dir=folder / "state", **options)
    if users is not None:
        models.users = lambda: users
    endpoint = hub.url if hub is not None else "http://127.0.0.1:9"
    access = HubAccess(endpoint=endpoint, token=token, patience=patience)
    downloads = Downloads(models, access, peers=peers, token=cluster_token)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(downloads.run)
        await downloads.started.wait()
        yield Store(models, downloads)
        tasks.cancel_scope.cancel()


def files_of(folder: Path) -> dict[str, bytes]:
    """Give a model's files, without what rbee keeps beside them."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def small_model(weights: bytes = b"w" * 1000, **config: Any) -> dict[str, bytes]:
    """Give the files of a model that is one in name only."""
    facts = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048} | config
    return {"config.json": msgspec.json.encode(facts), "model.safetensors": weights}
