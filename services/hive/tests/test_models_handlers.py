"""The operations on model files, through a job server's routes."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from hub_server import Hub, running_hub
from rbee_downloads import Store, running_store, small_model
from rbee_inprocess import Running, eventually, running

from rbee_contracts.jobs import DONE
from rbee_hive.models import ModelHandlers

BIG = bytes(range(256)) * 12_000


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.add("org/tiny", small_model(BIG))
        yield hub


@asynccontextmanager
async def serving(folder: Path, hub: Hub, **options: Any) -> AsyncIterator[tuple[Running, Store]]:
    async with running_store(folder, hub, **options) as store:
        table = ModelHandlers(store.models, store.downloads).table()
        async with running(table, service="hive", actor="hive/box1") as hive:
            yield hive, store


async def end_of(hive: Running, operation: str, model: str, **fields: Any) -> dict[str, Any]:
    """Run an operation; give its last event, or its error."""
    job_id = await hive.submit({"operation": operation, "model": model, **fields})
    events: list[dict[str, Any]] = [frame.json for frame in await hive.read(job_id) if frame.data != DONE]
    errors = [event for event in events if event["action"] == "error"]
    return errors[0] if errors else events[-1]


async def test_a_download_gives_the_model(tmp_path: Path, hub: Hub) -> None:
    async with serving(tmp_path, hub) as (hive, _):
        last = await end_of(hive, "model_download", "org/tiny", revision="main")

    assert last["action"] == "execute_complete"
    assert last["data"]["model"] == "org/tiny@main"
    assert last["data"]["revision"] == hub.repos["org/tiny"].commit
    assert (tmp_path / "models/org/tiny@main").is_dir()


async def test_an_unfinished_download_can_be_deleted(tmp_path: Path, hub: Hub) -> None:
    hub.fail("hold", hub.content_path("org/tiny", "model.safetensors"), after=2_000_000, times=1)
    async with serving(tmp_path, hub) as (hive, store):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.fetch, "org/tiny")
            await eventually(lambda: store.partial_size() > 1_000_000, "some of it is here")
            refused = await end_of(hive, "model_delete", "org/tiny")
            tasks.cancel_scope.cancel()
        await eventually(lambda: not store.downloads.is_running("org/tiny"), "it has stopped")
        kept = store.partial_size()
        last = await end_of(hive, "model_delete", "org/tiny")

        assert refused["code"] == "download_running"
        assert last["data"]["freed"] >= kept
        assert store.staged() == []
        assert (await end_of(hive, "model_delete", "org/tiny"))["code"] == "model_not_found"


async def test_what_is_not_ours_or_in_use_is_not_deleted(tmp_path: Path, hub: Hub) -> None:
    extra = tmp_path / "extra/theirs"
    extra.mkdir(parents=True)
    (extra / "config.json").write_bytes(b"{}")
    users = {"org/tiny": ["worker-7"]}
    async with serving(tmp_path, hub, users=users, extra_roots=[extra.parent]) as (hive, store):
        await store.fetch("org/tiny")
        in_use = await end_of(hive, "model_delete", "org/tiny")
        elsewhere = await end_of(hive, "model_delete", "theirs")

        assert (in_use["code"], "worker-7" in in_use["message"]) == ("model_in_use", True)
        assert elsewhere["code"] == "model_elsewhere"
        assert store.listed() == ["org/tiny", "theirs"]


async def test_models_are_listed_and_described(tmp_path: Path, hub: Hub) -> None:
    users = {"org/tiny": ["worker-7"]}
    async with serving(tmp_path, hub, users=users) as (hive, store):
        await store.fetch("org/tiny")
        listed = await end_of(hive, "model_list", "ignored")
        described = await end_of(hive, "model_get", "org/tiny")

    (info,) = listed["data"]["models"]
    assert (info["model"], info["used_by"]) == ("org/tiny", ["worker-7"])
    assert "file_list" not in info
    assert [file["path"] for file in described["data"]["file_list"]] == ["config.json", "model.safetensors"]
