"""Which directories are models, and that an id never leads out of the models folder."""

import json
from pathlib import Path

import pytest

from rbee_contracts.errors import NotFound
from rbee_hive.models import Models


def make_model(path: Path, **config: object) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"x" * 100)
    return path


def test_models_are_found_by_name_and_by_org_and_name(tmp_path: Path) -> None:
    make_model(
        tmp_path / "tiny",
        architectures=["LlamaForCausalLM"],
        torch_dtype="bfloat16",
        max_position_embeddings=2048,
    )
    make_model(tmp_path / "org" / "big")
    (tmp_path / "not-a-model").mkdir()

    found = Models(tmp_path).find()

    assert [model.model for model in found] == ["org/big", "tiny"]
    tiny = found[1]
    assert (tiny.architecture, tiny.dtype, tiny.max_model_len) == ("LlamaForCausalLM", "bfloat16", 2048)
    assert (tiny.size, tiny.files) == (100, 2)


def test_a_model_whose_config_cannot_be_read_is_listed_without_facts(tmp_path: Path) -> None:
    make_model(tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_bytes(b"\xff[" * 10)

    (odd,) = Models(tmp_path).find()

    assert odd.architecture is None


def test_a_link_out_of_the_folder_is_not_a_model(tmp_path: Path) -> None:
    outside = make_model(tmp_path / "outside")
    root = tmp_path / "models"
    root.mkdir()
    (root / "linked").symlink_to(outside)

    assert Models(root).find() == []
    with pytest.raises(NotFound):
        Models(root).path("linked")


@pytest.mark.parametrize("model", ["../outside", "/etc", "..", ".", "", "models/../../outside", ".hidden"])
def test_a_hostile_id_finds_nothing(tmp_path: Path, model: str) -> None:
    make_model(tmp_path / "outside")
    make_model(tmp_path / "models" / ".hidden")

    with pytest.raises(NotFound):
        Models(tmp_path / "models").path(model)


def test_a_missing_folder_has_no_models(tmp_path: Path) -> None:
    assert Models(tmp_path / "none").find() == []


def test_not_found_names_what_is_there(tmp_path: Path) -> None:
    make_model(tmp_path / "tiny")

    with pytest.raises(NotFound, match="Models here: tiny"):
        Models(tmp_path).path("huge")
