"""What `/v1/models` tells: models that run or lie on some hive, and names that stand for them. Pure."""

import difflib
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from rbee_contracts.nodes import SERVING, HiveInfo, WorkerInfo
from rbee_queen.openai.aliases import Alias

ON_DISK = "on_disk"
"""The state of a model that lies on a hive and is not loaded."""

_STATES = ("ready", "busy", "sleeping", "starting", "draining", "stopping", "failed", "stopped")
"""Of several workers of a model the one that stands first here tells the model's state."""


class ModelWorker(Struct, frozen=True, kw_only=True):
    """One worker of a model."""

    hive_id: str
    worker_id: str
    state: str


class Model(Struct, frozen=True, kw_only=True, omit_defaults=False):
    """One entry of the list, with the fields of OpenAI's, of vLLM's, of Anthropic's, and our own.

    `state` is that of its best worker, or `on_disk`. `max_model_len` is the context in tokens: of the
    smallest worker that serves it, else what the model's own files say; None where nobody knows.
    `root` is the model that an alias stands for, `parent` the one that an adapter adapts. `hives` are those
    whose models folder has it.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["rbee"] = "rbee"
    root: str
    parent: str | None = None
    max_model_len: int | None
    state: str
    workers: list[ModelWorker]
    hives: list[str]
    type: Literal["model"] = "model"
    display_name: str
    created_at: str


class ModelCatalog(Struct, frozen=True, kw_only=True):
    """Answer of `GET /v1/models`, whole and in one page."""

    object: Literal["list"] = "list"
    data: list[Model]
    has_more: Literal[False] = False
    first_id: str | None
    last_id: str | None


EPOCH = "1970-01-01T00:00:00Z"


def list_models(hives: Iterable[HiveInfo], aliases: Iterable[Alias]) -> ModelCatalog:
    """List what the cluster has, by name; those that serve come first, then each alias of a model."""
    found: dict[str, list[tuple[HiveInfo, WorkerInfo]]] = {}
    on_disk: dict[str, list[str]] = {}
    lengths: dict[str, int] = {}
    for hive in hives:
        for info in hive.models:
            found.setdefault(info.model, [])
            on_disk.setdefault(info.model, []).append(hive.hive_id)
            if info.max_model_len is not None:
                lengths.setdefault(info.model, info.max_model_len)
        for worker in hive.workers:
            found.setdefault(worker.model, []).append((hive, worker))
    models = [
        _model(name, name, workers, on_disk.get(name, []), lengths.get(name))
        for name, workers in sorted(found.items())
    ]
    models.sort(key=lambda model: model.state not in SERVING)
    models += [
        replace(
            _model(
                alias.name,
                alias.model,
                found[alias.model],
                on_disk.get(alias.model, []),
                lengths.get(alias.model),
            ),
            parent=alias.model if alias.is_adapter else None,
        )
        for alias in aliases
        if alias.model in found and alias.name not in found
    ]
    ids = [model.id for model in models]
    return ModelCatalog(data=models, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)


def _model(
    name: str,
    root: str,
    workers: Sequence[tuple[HiveInfo, WorkerInfo]],
    hives: list[str],
    told_by_files: int | None,
) -> Model:
    states = [worker.state for _, worker in workers]
    lengths = [w.max_model_len for _, w in workers if w.state in SERVING and w.max_model_len is not None]
    started = min((worker.started_at for _, worker in workers), default=EPOCH)
    return Model(
        id=name,
        created=_seconds(started),
        root=root,
        max_model_len=min(lengths, default=told_by_files),
        state=min(states, key=_STATES.index, default=ON_DISK),
        workers=[ModelWorker(hive_id=h.hive_id, worker_id=w.worker_id, state=w.state) for h, w in workers],
        hives=hives,
        display_name=name,
        created_at=started,
    )


def _seconds(timestamp: str) -> int:
    try:
        return int(datetime.fromisoformat(timestamp).timestamp())
    except ValueError:
        return 0


def is_known(model: str, hives: Iterable[HiveInfo]) -> bool:
    """Whether a model runs on, or lies on, some hive."""
    return any(
        any(worker.model == model for worker in hive.workers) or any(m.model == model for m in hive.models)
        for hive in hives
    )


def serving(hives: Iterable[HiveInfo]) -> list[str]:
    """Give the models that some worker serves now."""
    return sorted({w.model for hive in hives for w in hive.workers if w.state in SERVING})


def not_found(model: str, models: ModelCatalog) -> str:
    """Say that there is no such model, and which ones have a name like it."""
    names = [known.id for known in models.data]
    near = difflib.get_close_matches(model, names, n=3, cutoff=0.5)
    text = f"The model {model[:100]!r} does not exist here: no worker serves it, and it lies on no hive."
    if near:
        return f"{text} Did you mean {' or '.join(near)}?"
    return f"{text} GET /v1/models lists those that do." if names else f"{text} There are none yet."
