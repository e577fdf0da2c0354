"""What a model's own files tell about it: architecture, type of its numbers, length of its context."""

import importlib.metadata
import importlib.util
import struct
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct

MAX_CONFIG_BYTES = 16 * 2**20

MAX_GGUF_KEYS = 4096
"""Keys read of a GGUF header; what is wanted stands among the first."""

MAX_GGUF_TEXT_BYTES = 16 * 2**20
MAX_GGUF_ITEMS = 4_000_000

LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "model_max_length",
)
"""Where a config.json tells the length of the context, in the order in which they are asked."""

NESTED_KEYS = ("text_config", "llm_config", "language_config")
"""Where a model that also sees or hears keeps the configuration of its language part."""

GGUF_TYPES = {
    0: "float32",
    1: "float16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "bfloat16",
}
"""The commonest of `general.file_type`; another is told by its number."""


class Facts(Struct, frozen=True, kw_only=True):
    """What is known of a model besides its files; None where they do not tell."""

    architecture: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None


def config_facts(path: Path) -> Facts:
    """Read a config.json. One that cannot be read tells nothing, and vLLM will say why."""
    try:
        with path.open("rb") as file:
            config = msgspec.json.decode(file.read(MAX_CONFIG_BYTES))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Facts()
    if not isinstance(config, dict):
        return Facts()
    layers = [config, *(config[key] for key in NESTED_KEYS if isinstance(config.get(key), dict))]
    architectures = config.get("architectures")
    dtypes = (layer.get("dtype") or layer.get("torch_dtype") for layer in layers)
    return Facts(
        architecture=str(architectures[0])[:200]
        if isinstance(architectures, list) and architectures
        else None,
        dtype=next((dtype[:64] for dtype in dtypes if isinstance(dtype, str)), None),
        max_model_len=next((length for layer in layers if (length := _length(layer)) is not None), None),
    )


def _length(config: dict[str, Any]) -> int | None:
    for key in LENGTH_KEYS:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53:
            return value
    return None


def gguf_facts(path: Path) -> Facts:
    """Read the header of a GGUF file. One that cannot be read tells nothing."""
    try:
        with path.open("rb") as file:
            header = _gguf_header(file)
    except (OSError, struct.error, ValueError, RecursionError):
        return Facts()
    architecture = header.get("general.architecture")
    length = header.get(f"{architecture}.context_length")
    file_type = header.get("general.file_type")
    return Facts(
        architecture=architecture[:200] if isinstance(architecture, str) else None,
        dtype=GGUF_TYPES.get(file_type, f"GGUF type {file_type}") if isinstance(file_type, int) else None,
        max_model_len=length if isinstance(length, int) and not isinstance(length, bool) else None,
    )


_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_TEXT, _ARRAY = 8, 9


def _gguf_header(file: BinaryIO) -> dict[str, Any]:
    """Give the keys of a GGUF header that are numbers or texts; lists are passed over.

    Raises:
        ValueError, struct.error: it is none.
    """
    if file.read(4) != b"GGUF" or _number(file, "<I") not in (2, 3):
        raise ValueError("no GGUF file of version 2 or 3")
    _number(file, "<Q")
    found: dict[str, Any] = {}
    for _ in range(min(_number(file, "<Q"), MAX_GGUF_KEYS)):
        key = _text(file)
        value = _value(file, _number(file, "<I"))
        if value is not None:
            found[key] = value
        if key.startswith("tokenizer."):
            break  # the facts stand before it, and it is long
    return found


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]


def _text(file: BinaryIO) -> str:
    length = _number(file, "<Q")
    if length > MAX_GGUF_TEXT_BYTES:
        raise ValueError("a text of that length is none")
    data = file.read(length)
    if len(data) != length:
        raise ValueError("the file ends in a text")
    return data.decode(errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in _NUMBERS:
        return _number(file, _NUMBERS[kind])
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        raise ValueError(f"no value has the kind {kind}")
    item, count = _number(file, "<I"), _number(file, "<Q")
    if count > MAX_GGUF_ITEMS:
        raise ValueError("a list of that length is none")
    if item in _NUMBERS:
        file.seek(struct.calcsize(_NUMBERS[item]) * count, 1)
        return None
    for _ in range(count):
        _value(file, item)
    return None


def loads_gguf() -> bool:
    """Whether the vLLM of this Python can load GGUF files: by itself, as it once could, or by its plugin."""
    try:
        importlib.metadata.distribution("vllm-gguf-plugin")
    except importlib.metadata.PackageNotFoundError:
        vllm = importlib.util.find_spec("vllm")  # finds it without importing it
        places = vllm.submodule_search_locations if vllm is not None else None
        return any(
            Path(place, "model_executor/model_loader/gguf_loader.py").is_file() for place in places or ()
        )
    return True
