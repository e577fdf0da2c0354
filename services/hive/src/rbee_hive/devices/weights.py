"""How large a model's weights are, told by the files' headers: nothing of the weights is read.

A safetensors file begins with eight bytes, the length of its header as a little-endian number, and the
header, a JSON object that gives each tensor's type, shape and place in the file.
"""

import os
import re
from math import prod
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from rbee_contracts.errors import Conflict

MAX_HEADER_BYTES = 100_000_000
"""The largest header that the safetensors library itself reads."""

INDEX_NAME = "model.safetensors.index.json"

FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that the engine turns into the one it runs with; all others stay as they are."""

OTHER_SUFFIXES = (".bin", ".pt", ".pth")
"""Weights whose headers cannot be read without running what they hold: the files' sizes are taken."""

_gguf_part = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.gguf\Z").match


class ModelUnreadable(Conflict):
    """The model's files do not tell what they should; the message names the file and the remedy."""

    title = "Model cannot be read"
    default_code = "model_unreadable"


class _Tensor(Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(Struct):
    weight_map: dict[str, str]


def weight_bytes(model: Path, *, float_bytes: int | None = None) -> int:
    """Give the size of a model's weights in memory, in bytes, over all devices together.

    Args:
        model: the model's directory, or one file of it.
        float_bytes: bytes of a number in the type the engine runs with; None leaves what the file has.

    Raises:
        ModelUnreadable: a file is missing, cut short or not what its name says.
    """
    try:
        if model.is_file():
            return _file_bytes(model, float_bytes)
        return sum(_file_bytes(path, float_bytes) for path in weight_files(model))
    except OSError as exc:
        raise _unreadable(model.name, f"it cannot be read: {exc.strerror}") from exc


def weight_files(model: Path) -> list[Path]:
    """Give the files that the engine would load.

    Raises:
        ModelUnreadable: there is none, or the index names one that is not there.
    """
    index = model / INDEX_NAME
    if index.is_file():
        return _indexed(model, index)
    names = sorted(path.name for path in model.iterdir() if path.is_file())
    found = [name for name in names if name.endswith(".safetensors")]
    # Mistral's own layout of the same weights, beside the usual one.
    found = [name for name in found if not name.startswith("consolidated")] or found
    if not found:
        found = _one_gguf(model, [name for name in names if name.endswith(".gguf")])
    if not found:
        found = [name for name in names if name.endswith(OTHER_SUFFIXES)]
    if not found:
        raise _unreadable(model.name, "it has no weights (*.safetensors, *.gguf, *.bin)")
    return [model / name for name in found]


def safetensors_bytes(path: Path, *, float_bytes: int | None = None) -> int:
    """Give the size of one safetensors file's tensors, in bytes.

    Raises:
        ModelUnreadable: its header is too long, is no header, or does not fit the file.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _unreadable(path.name, "it ends before its header does")
        if length > MAX_HEADER_BYTES:
            raise _unreadable(path.name, f"its header says to have {length} bytes, which no model has")
        header = file.read(length)
    held = size - 8 - length
    total = stored = 0
    for name, tensor in _tensors(path.name, header).items():
        begin, end = tensor.data_offsets
        numbers = prod(tensor.shape)
        width = FLOAT_BYTES.get(tensor.dtype)
        if not 0 <= begin <= end <= held or min(tensor.shape, default=0) < 0:
            raise _unreadable(path.name, f"it says that {name[:80]!r} lies where the file does not reach")
        if width is not None and numbers * width != end - begin:
            raise _unreadable(path.name, f"the shape of {name[:80]!r} does not fit its bytes")
        stored += end - begin
        total += end - begin if width is None or float_bytes is None else numbers * float_bytes
    if stored != held:
        raise _unreadable(path.name, f"its tensors have {stored} bytes and the file holds {held}")
    return total


def _tensors(name: str, header: bytes) -> dict[str, _Tensor]:
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        return {key: msgspec.json.decode(entry, type=_Tensor) for key, entry in entries.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise _unreadable(name, "its header is not that of a safetensors file") from exc


def _indexed(model: Path, index: Path) -> list[Path]:
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise _unreadable(index.name, "it is larger than any index")
    try:
        shards = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise _unreadable(index.name, "it is not an index of safetensors files") from exc
    if not shards:
        raise _unreadable(index.name, "it names no file")
    for shard in sorted(shards):
        if os.path.basename(shard) != shard or not shard.endswith(".safetensors"):
            raise _unreadable(index.name, f"it names {shard[:80]!r}, which is no file of this model")
        if not (model / shard).is_file():
            raise _unreadable(index.name, f"it names {shard[:80]!r}, which is not there")
    return [model / shard for shard in sorted(shards)]


def _one_gguf(model: Path, names: list[str]) -> list[str]:
    """Give the files of one model: several GGUF files in a folder are the same model in several sizes.

    The largest is taken, so that the estimate is not too small.
    """
    models: dict[str, list[str]] = {}
    for name in names:
        part = _gguf_part(name)
        models.setdefault(part["stem"] if part else name, []).append(name)
    return max(
        models.values(), key=lambda parts: sum((model / part).stat().st_size for part in parts), default=[]
    )


def _file_bytes(path: Path, float_bytes: int | None) -> int:
    if path.suffix == ".safetensors":
        return safetensors_bytes(path, float_bytes=float_bytes)
    return path.stat().st_size


def _unreadable(name: str, cause: str) -> ModelUnreadable:
    return ModelUnreadable(
        f"The memory that the model needs cannot be told from {name!r}: {cause}. "
        "Fetch the model again: rbee model download"
    )


def read_json(path: Path, limit: int = MAX_HEADER_BYTES) -> dict[str, Any] | None:
    """Give a JSON object from a file; None where there is none that can be read."""
    try:
        if path.stat().st_size > limit:
            return None
        value = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
