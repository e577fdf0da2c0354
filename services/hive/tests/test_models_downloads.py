"""Transfers shared, stopped, resumed and published; space promised; what a crash leaves."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from hub_server import Hub, running_hub
from rbee_downloads import Store, Told, files_of, running_store, small_model
from rbee_inprocess import eventually

from rbee_contracts.errors import Conflict, InvalidRequest, NoCapacity, NotFound
from rbee_hive.models.record import RECORD_NAME, Record, read_record
from rbee_hive.models.staging import KEEP_PARTIALS_S, Folder

WEIGHTS = "model.safetensors"
BIG = bytes(range(256)) * 12_000
"""Three megabytes: several writes."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.add("org/tiny", small_model(BIG))
        yield hub


async def held(hub: Hub, store: Store, count: int = 1) -> None:
    """Wait until so many answers stand still in their middle, with bytes of the weights on our disk."""
    await eventually(lambda: hub.held >= count, "the hub holds an answer")
    await eventually(lambda: store.partial_size() > 1_000_000, "bytes lie on the disk")


# --- sharing -------------------------------------------------------------------------------------------


async def test_two_who_ask_for_the_same_share_one_transfer(tmp_path: Path, hub: Hub) -> None:
    """F44: one transfer, two watchers; one leaving does not stop it."""
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail("hold", path, after=2_000_000, times=1)
    leaver, stayer = Told(), Told()
    async with running_store(tmp_path, hub) as store, anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()

        async def leave() -> None:
            with scope:
                await store.fetch("org/tiny", leaver)

        async def stay() -> None:
            await store.fetch("org/tiny", stayer)

        tasks.start_soon(leave)
        await held(hub, store)
        tasks.start_soon(stay)
        await eventually(lambda: stayer.progress() and leaver.progress(), "both are told of progress")
        scope.cancel()
        await eventually(lambda: store.downloads._transfers["org/tiny"].watchers == 1, "one has left")
        hub.go_on()

    assert files_of(tmp_path / "models/org/tiny") == small_model(BIG)
    assert len(hub.bodies(path)) == 1
    starts = [data["joined"] for action, _, data in leaver.events + stayer.events if action.endswith("start")]
    assert starts == [False, True]


async def test_all_who_share_a_transfer_get_its_error(tmp_path: Path, hub: Hub) -> None:
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail("corrupt", path)
    hub.fail("hold", path, times=1)
    errors = []
    async with running_store(tmp_path, hub) as store, anyio.create_task_group() as tasks:

        async def fail() -> None:
            with pytest.raises(Exception) as error:  # noqa: PT011
                await store.fetch("org/tiny")
            errors.append(error.value)

        tasks.start_soon(fail)
        await eventually(lambda: hub.held == 1, "the hub holds an answer")
        tasks.start_soon(fail)
        await eventually(lambda: store.downloads._transfers["org/tiny"].watchers == 2, "two watch")
        hub.go_on()

    assert len(errors) == 2
    assert errors[0] is not errors[1]
    assert {str(error) for error in errors} == {str(errors[0])}


async def test_the_last_one_to_leave_stops_it_and_the_next_one_goes_on(tmp_path: Path, hub: Hub) -> None:
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail("hold", path, after=2_000_000, times=1)
    async with running_store(tmp_path, hub) as store:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.fetch, "org/tiny")
            await held(hub, store)
            tasks.cancel_scope.cancel()
        await eventually(lambda: not store.downloads.is_running("org/tiny"), "it has stopped")
        kept = store.partial_size()
        assert 0 < kept <= 2_000_000
        assert store.listed() == []
        assert store.models.space.reserved == 0

        told = Told()
        await store.fetch("org/tiny", told)

    assert hub.bodies(path)[1].headers["range"] == f"bytes={kept}-{len(BIG) - 1}"
    assert told.progress()[0].bytes_done >= kept
    assert files_of(tmp_path / "models/org/tiny") == small_model(BIG)


async def test_another_choice_of_files_waits_for_its_turn(tmp_path: Path, hub: Hub) -> None:
    hub.add("org/tiny", small_model(BIG) | {"extra.bin": b"e" * 100})
    hub.fail("hold", hub.content_path("org/tiny", WEIGHTS), after=10, times=1)
    told = Told()
    async with running_store(tmp_path, hub) as store, anyio.create_task_group() as tasks:
        tasks.start_soon(store.fetch, "org/tiny")
        await eventually(lambda: hub.held == 1, "the hub holds an answer")

        async def other() -> None:
            await store.fetch("org/tiny", told, patterns=["*.json", "extra.bin"])

        tasks.start_soon(other)
        await eventually(lambda: "model_download_wait" in told.actions(), "the other one waits")
        hub.go_on()

    assert set(files_of(tmp_path / "models/org/tiny")) == {"config.json", WEIGHTS, "extra.bin"}
    assert len(hub.bodies(hub.content_path("org/tiny", WEIGHTS))) == 1


async def test_who_comes_while_a_transfer_is_being_stopped_gets_one_of_his_own(
    tmp_path: Path, hub: Hub
) -> None:
    hub.fail("hold", hub.content_path("org/tiny", WEIGHTS), after=1_500_000, times=1)
    async with running_store(tmp_path, hub) as store:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.fetch, "org/tiny")
            await held(hub, store)
            tasks.cancel_scope.cancel()
        outcome = await store.fetch("org/tiny")

        assert outcome.source == "the hub"
        assert store.listed() == ["org/tiny"]


# --- revisions -----------------------------------------------------------------------------------------


async def test_a_revision_lies_beside_the_model_and_shares_equal_files(tmp_path: Path, hub: Hub) -> None:
    repo = hub.repos["org/tiny"]
    repo.revisions = ("main", "v1")
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/tiny")
        asked = len(hub.bodies("/blobs/"))
        await store.fetch("org/tiny", revision="v1")

        assert store.listed() == ["org/tiny", "org/tiny@v1"]
        assert len(hub.bodies("/blobs/")) == asked
        shared = tmp_path / "models/org/tiny@v1" / WEIGHTS
        assert shared.stat().st_ino == (tmp_path / "models/org/tiny" / WEIGHTS).stat().st_ino
        assert store.models.disk().models == sum(map(len, small_model(BIG).values()))

        _, freed = store.models.discard(store.models.entry("org/tiny@v1"))
        assert freed == 0
        assert files_of(tmp_path / "models/org/tiny") == small_model(BIG)


async def test_a_newer_commit_replaces_what_lies_here_and_only_the_new_is_fetched(
    tmp_path: Path, hub: Hub
) -> None:
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/tiny")
        newer = hub.add("org/tiny", small_model(BIG, max_position_embeddings=4096))
        asked = len(hub.bodies("/blobs/"))
        outcome = await store.fetch("org/tiny")

        assert outcome.revision == newer.commit
        assert store.models.get("org/tiny").max_model_len == 4096
        assert len(hub.bodies("/blobs/")) == asked
        assert files_of(tmp_path / "models/org/tiny") == newer.files
        assert not (tmp_path / "models/.trash").exists()


async def test_a_model_in_use_is_not_replaced(tmp_path: Path, hub: Hub) -> None:
    users: dict[str, list[str]] = {}
    async with running_store(tmp_path, hub, users=users) as store:
        await store.fetch("org/tiny")
        users["org/tiny"] = ["worker-1"]
        hub.add("org/tiny", small_model(BIG[:100]))
        with pytest.raises(Conflict, match="worker-1") as error:
            await store.fetch("org/tiny")

        assert error.value.code == "model_in_use"
        assert files_of(tmp_path / "models/org/tiny") == small_model(BIG)


async def test_a_hub_that_is_down_leaves_what_lies_here(tmp_path: Path, hub: Hub) -> None:
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/tiny")
        hub.fail("status", "/api/", status=503)
        told = Told()
        outcome = await store.fetch("org/tiny", told)

    assert outcome.source is None
    assert "warning" in told.actions()


async def test_a_folder_put_there_by_hand_is_left_alone(tmp_path: Path, hub: Hub) -> None:
    place = tmp_path / "models/org/tiny"
    place.mkdir(parents=True)
    (place / "config.json").write_bytes(b"{}")
    told = Told()
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/tiny", told)

    assert files_of(place) == {"config.json": b"{}"}
    assert hub.asked == []
    assert "by hand" in told.text()


async def test_a_name_that_is_taken_is_refused(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "models/org/tiny").mkdir(parents=True)
    (tmp_path / "models/one").mkdir(parents=True)
    (tmp_path / "models/one/config.json").write_bytes(b"{}")
    hub.add("one/two", small_model())
    async with running_store(tmp_path, hub) as store:
        for model in ("org/tiny", "one/two"):
            with pytest.raises(Conflict) as error:
                await store.fetch(model)
            assert error.value.code == "name_taken"


async def test_two_names_for_one_revision_are_refused(tmp_path: Path, hub: Hub) -> None:
    async with running_store(tmp_path, hub) as store:
        with pytest.raises(InvalidRequest, match=r"'v1'.*'v2'"):
            await store.fetch("org/tiny@v1", revision="v2")


async def test_a_file_changed_by_hand_is_fetched_again(tmp_path: Path, hub: Hub) -> None:
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/tiny")
        (tmp_path / "models/org/tiny/config.json").write_bytes(b'{"changed":true}')
        await store.fetch("org/tiny")

    assert files_of(tmp_path / "models/org/tiny") == small_model(BIG)


# --- space ---------------------------------------------------------------------------------------------


async def test_no_space_names_what_is_missing_and_what_could_go(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/old", small_model(b"o" * 5000))
    hub.add("org/busy", small_model(b"b" * 5000))
    users = {"org/busy": ["worker-1"]}
    async with running_store(tmp_path, hub, users=users) as store:
        await store.fetch("org/old")
        await store.fetch("org/busy")
        asked = len(hub.bodies("/blobs/"))
        monkeypatch.setattr(store.models.space, "measure", lambda: (10_000_000, 1_000_000))
        with pytest.raises(NoCapacity) as error:
            await store.fetch("org/tiny")

        assert error.value.code == "no_space"
        assert not error.value.retryable
        assert "2.2 MB are missing" in error.value.details
        assert "org/old (5.1 kB, not used yet)" in error.value.details
        assert "org/busy" not in error.value.details
        assert len(hub.bodies("/blobs/")) == asked
        monkeypatch.undo()
        await store.fetch("org/tiny")
        assert "org/tiny" in store.listed()


async def test_two_downloads_cannot_have_the_same_space(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/other", small_model(BIG[::-1]))
    hub.fail("hold", hub.content_path("org/tiny", WEIGHTS), after=10, times=1)
    async with running_store(tmp_path, hub) as store, anyio.create_task_group() as tasks:
        monkeypatch.setattr(store.models.space, "measure", lambda: (10_000_000, 4_000_000))
        tasks.start_soon(store.fetch, "org/tiny")
        await eventually(lambda: hub.held == 1, "the hub holds an answer")
        assert 3_000_000 < store.models.disk().reserved <= len(BIG) + 1000
        with pytest.raises(NoCapacity, match="promised to other downloads"):
            await store.fetch("org/other")
        hub.go_on()
        await eventually(lambda: store.listed() == ["org/tiny"], "the first one is here")
        assert store.models.disk().reserved == 0


# --- after a crash -------------------------------------------------------------------------------------


async def test_what_was_whole_when_the_hive_ended_is_published_at_the_next_start(
    tmp_path: Path, hub: Hub
) -> None:
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/tiny")
    staging = tmp_path / "models/.downloads/org%2Ftiny"
    staging.mkdir(parents=True)
    (tmp_path / "models/org/tiny").rename(staging / "ready")

    async with running_store(tmp_path) as store:
        assert store.listed() == ["org/tiny"]
    assert not staging.exists()


async def test_a_tree_that_was_not_whole_is_never_published(tmp_path: Path) -> None:
    tree = tmp_path / "models/.downloads/org%2Ftiny/tree"
    tree.mkdir(parents=True)
    (tree / "config.json").write_bytes(b"{}")

    async with running_store(tmp_path) as store:
        assert store.listed() == []
    assert not tree.exists()


@pytest.mark.parametrize(("age_s", "is_kept"), [(KEEP_PARTIALS_S / 2, True), (KEEP_PARTIALS_S + 60, False)])
async def test_an_unfinished_download_is_kept_for_two_weeks(
    tmp_path: Path, age_s: float, is_kept: bool
) -> None:
    staging = tmp_path / "models/.downloads/org%2Ftiny"
    staging.mkdir(parents=True)
    (staging / "sha256-0.part").write_bytes(b"x")
    (staging / "lock").write_bytes(b"")
    then = time.time() - age_s
    os.utime(staging, (then, then))

    async with running_store(tmp_path):
        assert staging.exists() == is_kept


async def test_trash_of_an_earlier_run_is_emptied(tmp_path: Path) -> None:
    trash = tmp_path / "models/.trash/abc"
    trash.mkdir(parents=True)
    (trash / "big").write_bytes(b"x")

    async with running_store(tmp_path):
        assert not trash.parent.exists()


async def test_a_folder_that_another_hive_downloads_into_is_refused(tmp_path: Path, hub: Hub) -> None:
    other = Folder(tmp_path / "models/.downloads/org%2Ftiny", "org/tiny")
    other.acquire()
    async with running_store(tmp_path, hub) as store:
        with pytest.raises(Conflict) as error:
            await store.fetch("org/tiny")
        assert error.value.code == "download_elsewhere"
        other.release()
        await store.fetch("org/tiny")
        assert store.listed() == ["org/tiny"]


async def test_a_models_folder_that_cannot_be_written_is_an_error_that_says_so(
    tmp_path: Path, hub: Hub
) -> None:
    (tmp_path / "models").write_bytes(b"a file")
    async with running_store(tmp_path, hub) as store:
        with pytest.raises(Exception, match="Check the folder") as error:
            await store.fetch("org/tiny")

    assert getattr(error.value, "code", "") == "models_folder_unusable"


def test_a_record_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / RECORD_NAME).write_bytes(b"\xff{")
    assert read_record(tmp_path) is None
    (tmp_path / RECORD_NAME).write_bytes(b'{"model":"m","source":"s","later":1}')
    assert read_record(tmp_path) == Record(model="m", source="s")


async def test_a_stop_of_the_hive_ends_its_watchers(tmp_path: Path, hub: Hub) -> None:
    hub.fail("hold", "/blobs/", after=10, times=1)
    with anyio.fail_after(50):
        async with running_store(tmp_path, hub) as store, anyio.create_task_group() as tasks:
            tasks.start_soon(store.fetch, "org/tiny")
            await eventually(lambda: hub.held == 1, "the hub holds an answer")
            tasks.cancel_scope.cancel()


async def test_a_model_that_nobody_has_is_an_error_for_the_source_hive(tmp_path: Path, hub: Hub) -> None:
    async with running_store(tmp_path, hub) as store:
        with pytest.raises(NotFound, match="--source hub") as error:
            await store.fetch("org/tiny", source="hive")

    assert error.value.code == "no_hive_has_it"
