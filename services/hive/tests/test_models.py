"""Which directories are models, and that an id never leads out of the models folder."""

import errno
import json
import os
from pathlib import Path

import anyio
import pytest
from rbee_inprocess import eventually

from rbee_contracts.errors import Conflict, NotFound, Unavailable
from rbee_hive.models import Models, catalogue, scan


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


# --- what is a model -----------------------------------------------------------------------------------


def test_gguf_files_are_models_where_they_can_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "alone.gguf").write_bytes(b"GGUF")
    (tmp_path / "org/one").mkdir(parents=True)
    (tmp_path / "org/one/weights.gguf").write_bytes(b"GGUF")
    (tmp_path / "two").mkdir()
    (tmp_path / "two/a.gguf").write_bytes(b"GGUF")
    (tmp_path / "two/b.gguf").write_bytes(b"GGUF")
    (tmp_path / "two/c-00001-of-00002.gguf").write_bytes(b"GGUF")

    models = Models(tmp_path, gguf=True)

    assert [(info.model, info.format) for info in models.find()] == [
        ("alone.gguf", "gguf"),
        ("org/one", "gguf"),
        ("two/a.gguf", "gguf"),
        ("two/b.gguf", "gguf"),
    ]
    assert models.path("alone.gguf") == tmp_path / "alone.gguf"
    assert models.path("org/one") == tmp_path / "org/one/weights.gguf"
    assert Models(tmp_path, gguf=False).find() == []


@pytest.mark.parametrize("name", [".hidden", "with space", "x" * 97, "ä", "a@b@c"])
def test_a_folder_whose_name_is_no_id_is_not_listed(tmp_path: Path, name: str) -> None:
    make_model(tmp_path / name)

    assert Models(tmp_path).find() == []


def test_a_folder_inside_a_model_is_not_another_one(tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    make_model(tmp_path / "m/original")

    (info,) = Models(tmp_path).find()

    assert (info.model, info.files) == ("m", 4)


def test_a_model_with_a_link_that_leads_out_is_not_listed_and_says_why(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "weights").write_bytes(b"x")
    root = tmp_path / "models"
    make_model(root / "m")
    (root / "m/extra.bin").symlink_to(outside / "weights")

    models = Models(root)
    assert models.find() == []
    with pytest.raises(NotFound, match="link that leads out"):
        models.path("m")
    assert [info.model for info in Models(root, extra_roots=[outside]).find()] == ["m"]


def test_a_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    (tmp_path / "alias").symlink_to(tmp_path / "m")

    assert [info.model for info in Models(tmp_path).find()] == ["alias", "m"]


def test_links_that_go_round_end(tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    (tmp_path / "m/again").symlink_to(tmp_path / "m")

    assert [info.model for info in Models(tmp_path).find()] == ["m"]


def test_extra_folders_are_listed_and_the_models_folder_wins(tmp_path: Path) -> None:
    make_model(tmp_path / "own/m", torch_dtype="float16")
    make_model(tmp_path / "extra/m")
    make_model(tmp_path / "extra/org/n")

    models = Models(tmp_path / "own", extra_roots=[tmp_path / "extra", tmp_path / "none"])

    assert [(info.model, info.dtype) for info in models.find()] == [("m", "float16"), ("org/n", None)]
    with pytest.raises(Conflict) as error:
        models.discard(models.entry("org/n"))
    assert error.value.code == "model_elsewhere"
    assert (tmp_path / "extra/org/n").is_dir()


def test_changes_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that changed lately are looked into; others only every few seconds, or when asked for."""
    monkeypatch.setattr(scan, "RACY_S", 3600.0)
    monkeypatch.setattr(scan, "DEEP_SCAN_EVERY_S", 3600.0)
    models = Models(tmp_path)
    assert models.find() == []
    path = make_model(tmp_path / "m")
    assert [info.size for info in models.find()] == [100]
    (path / "model.safetensors").write_bytes(b"x" * 300)
    assert [info.size for info in models.find()] == [300]

    monkeypatch.setattr(scan, "RACY_S", -1000.0)
    models.find()
    looked: list[Path] = []

    def look(root: Path) -> list[scan.Entry]:
        looked.append(root)
        return []

    monkeypatch.setattr(models._scanner, "_models_in", look)
    models.find()
    assert looked == []
    monkeypatch.setattr(scan, "DEEP_SCAN_EVERY_S", -1.0)
    models.find()
    assert looked == [tmp_path]


def test_a_model_that_goes_is_not_listed(tmp_path: Path) -> None:
    path = make_model(tmp_path / "org/m")
    models = Models(tmp_path)
    models.find()

    place, freed = models.discard(models.entry("org/m"))

    assert models.find() == []
    assert freed == sum(file.stat().st_size for file in place.iterdir())
    assert not path.parent.exists()
    models.empty_trash()
    assert list(tmp_path.iterdir()) == []


def test_when_a_model_was_last_used_is_remembered(tmp_path: Path) -> None:
    make_model(tmp_path / "models/m")
    models = Models(tmp_path / "models", state_dir=tmp_path / "state")
    assert models.get("m").last_used_at is None

    models.used("m")

    assert Models(tmp_path / "models", state_dir=tmp_path / "state").get("m").last_used_at is not None


def test_the_disk_counts_shared_files_once(tmp_path: Path) -> None:
    make_model(tmp_path / "a")
    make_model(tmp_path / "b")
    (tmp_path / "b/model.safetensors").unlink()
    os.link(tmp_path / "a/model.safetensors", tmp_path / "b/model.safetensors")

    disk = Models(tmp_path).disk()

    assert disk.models == 100 + 2 * len(json.dumps({}))
    assert disk.reserved == 0
    assert 0 < disk.free < disk.total


def test_the_disk_of_a_folder_that_is_not_there_yet_is_that_of_its_parent(tmp_path: Path) -> None:
    assert Models(tmp_path / "not/yet").disk().total == Models(tmp_path).disk().total


async def test_users_are_told_with_a_model(tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    models = Models(tmp_path)
    models.users = lambda: {"m": ["worker-1", "worker-2"]}

    (listed,) = await models.listed()

    assert listed.used_by == ["worker-1", "worker-2"]
    assert (await models.described("m")).used_by == ["worker-1", "worker-2"]
    with pytest.raises(Conflict, match="worker-1, worker-2") as error:
        models.refuse_used("m", "deleted")
    assert error.value.code == "model_in_use"


# --- sums ----------------------------------------------------------------------------------------------


async def test_sums_are_computed_in_the_background_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "SUM_EVERY_S", 0.01)
    path = make_model(tmp_path / "m")
    models = Models(tmp_path)

    def sums() -> list[str | None]:
        return [file.sha256 for file in models.get("m").file_list]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(models.compute_sums)
        await eventually(lambda: None not in sums(), "all sums are known")
        before = sums()
        (path / "config.json").write_text('{"changed": 1}')
        assert sums()[0] is None
        await eventually(lambda: None not in sums(), "the new sum is known")
        assert sums()[0] != before[0]
        assert sums()[1] == before[1]
        tasks.cancel_scope.cancel()


async def test_a_manifest_whose_sums_take_too_long_says_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "SUM_WAIT_S", 0.01)
    make_model(tmp_path / "m")

    with pytest.raises(Unavailable) as error:
        await Models(tmp_path).manifest("m")

    assert error.value.code == "sums_pending"
    assert error.value.retryable


async def test_a_manifest_of_a_model_that_cannot_be_read_says_so_and_does_not_try_without_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def fail(*_: object) -> bool:
        nonlocal tries
        tries += 1
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(catalogue, "_digest_some", fail)
    monkeypatch.setattr(catalogue, "SUM_WAIT_S", 60.0)
    make_model(tmp_path / "m")
    models = Models(tmp_path)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(models.compute_sums)
        for _ in range(2):
            with pytest.raises(
                Unavailable, match="m cannot be read on this hive: Input/output error"
            ) as error:
                await models.manifest("m")
            assert (error.value.code, error.value.retryable) == ("model_unreadable", False)
        tasks.cancel_scope.cancel()
    assert tries < 50
