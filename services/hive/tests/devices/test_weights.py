"""The size of weights, told by the files' headers, and what a damaged or hostile file gives."""

import json
from pathlib import Path
from typing import Any

import pytest

from rbee_hive.devices.weights import (
    MAX_HEADER_BYTES,
    ModelUnreadable,
    safetensors_bytes,
    weight_bytes,
    weight_files,
)

MODELS = Path(__file__).resolve().parents[4] / "models"


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header: object, data: int, *, length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(encoded) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + encoded + bytes(data))
    return path


def test_a_real_model() -> None:
    path = MODELS / "rbee-tiny/model.safetensors"

    assert weight_bytes(MODELS / "rbee-tiny") == safetensors_bytes(path)
    assert 0 < path.stat().st_size - safetensors_bytes(path) < 10_000


def test_floats_count_as_the_type_the_engine_runs_with_and_quantised_ones_as_they_are(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt", "dtype": "whatever"},
        "a": tensor("F32", [10, 4], 0, 160),
        "b": tensor("BF16", [8], 160, 176),
        "c": tensor("I8", [5], 176, 181),
        "d": tensor("F8_E4M3", [3], 181, 184),
        "e": tensor("F4", [4], 184, 186),
        "scalar": tensor("F32", [], 186, 190),
    }
    path = write(tmp_path / "model.safetensors", header, 190)

    assert safetensors_bytes(path) == 190
    assert safetensors_bytes(path, float_bytes=2) == 80 + 16 + 5 + 3 + 2 + 2


def test_the_shards_of_the_index_and_nothing_else(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002", "model-00002-of-00002", "old"):
        write(tmp_path / f"{name}.safetensors", {"a": tensor("F16", [4], 0, 8)}, 8)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    assert weight_bytes(tmp_path) == 16


def test_mistrals_second_copy_of_the_same_weights_counts_once(tmp_path: Path) -> None:
    for name in ("consolidated", "model"):
        write(tmp_path / f"{name}.safetensors", {"a": tensor("F16", [4], 0, 8)}, 8)

    assert weight_bytes(tmp_path) == 8


def test_of_several_gguf_sizes_the_largest_counts_with_all_its_parts(tmp_path: Path) -> None:
    for name, size in {"m-q4": 10, "m-q8-00001-of-00002": 9, "m-q8-00002-of-00002": 7}.items():
        (tmp_path / f"{name}.gguf").write_bytes(bytes(size))

    assert [path.name for path in weight_files(tmp_path)] == [
        "m-q8-00001-of-00002.gguf",
        "m-q8-00002-of-00002.gguf",
    ]
    assert weight_bytes(tmp_path) == 16
    assert weight_bytes(tmp_path / "m-q4.gguf") == 10


def test_files_that_only_running_them_would_read_count_by_size(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(12))

    assert weight_bytes(tmp_path) == 12


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (b"", 0, 5),
        ({}, 0, MAX_HEADER_BYTES + 1),
        (b"not json", 0, None),
        (b"[1]", 0, None),
        (b'{"a": 1}', 0, None),
        (b"\xff\xfe", 0, None),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", 0, None),
        ({"a": {"dtype": "F16", "shape": [4]}}, 8, None),
        ({"a": tensor("F16", [4], 0, 8)}, 4, None),
        ({"a": tensor("F16", [4], 8, 0)}, 8, None),
        ({"a": tensor("F16", [4], -8, 0)}, 8, None),
        ({"a": tensor("F16", [5], 0, 8)}, 8, None),
        ({"a": tensor("U8", [-8], 0, 8)}, 8, None),
        ({"a": tensor("F16", [4], 0, 8), "b": tensor("F16", [4], 0, 8)}, 8, None),
        ({"a": tensor("F16", [4], 0, 8)}, 9, None),
    ],
    ids=[
        "cut-in-the-header", "header-too-long", "no-json", "no-object", "no-tensor", "no-text", "deep",
        "no-offsets", "cut-in-the-data", "backwards", "before-the-data", "shape-does-not-fit",
        "negative-shape", "twice-the-same-bytes", "bytes-of-nobody",
    ],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_refused_by_name(
    tmp_path: Path, header: object, data: int, length: int | None
) -> None:
    path = write(tmp_path / "model.safetensors", header, data, length=length)

    with pytest.raises(ModelUnreadable, match=r"model\.safetensors") as raised:
        weight_bytes(tmp_path)

    assert raised.value.code == "model_unreadable"
    assert "Fetch the model again" in raised.value.details
    assert path.exists()


def test_a_header_that_says_to_be_huge_is_not_read(tmp_path: Path) -> None:
    """The file is sparse: it has the length, and reading it would take the memory."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((1 << 33).to_bytes(8, "little"))
        file.truncate((1 << 33) + 16)

    with pytest.raises(ModelUnreadable, match="header says to have"):
        weight_bytes(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../other/model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "config.json"}},
        {"weight_map": {"a": "gone.safetensors"}},
        {"weight_map": {}},
        {"weight_map": []},
        [],
    ],
    ids=["above", "absolute", "no-weights", "gone", "empty", "no-map", "no-object"],
)
def test_an_index_that_names_what_is_not_there(tmp_path: Path, index: object) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ModelUnreadable, match="index"):
        weight_bytes(tmp_path)


def test_an_index_that_is_huge_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(MAX_HEADER_BYTES + 1)

    with pytest.raises(ModelUnreadable, match="larger than any index"):
        weight_bytes(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match="no weights"):
        weight_bytes(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match="cannot be read"):
        weight_bytes(tmp_path / "gone")
