"""What the hive tells of its workers and devices, and what it answers for a worker that cannot be asked."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from prometheus_client.metrics_core import Metric as Family
from rbee_inprocess import running
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from rbee_contracts.errors import WorkerLost
from rbee_contracts.nodes import Device, WorkerInfo
from rbee_hive import metrics as module
from rbee_hive.metrics import (
    device_families,
    fetch_worker_metrics,
    model_labels,
    worker_families,
    worker_metrics_route,
)
from rbee_hive.models import Downloads, Models
from rbee_hive.supervisor.machine import begin
from rbee_hive.supervisor.worker import Running, Spec, Worker
from rbee_hive.supervisor.workers import Workers
from rbee_job_client import JobClient
from rbee_job_server.access import AccessConfig

pytestmark = pytest.mark.anyio

TOKEN = "the-token-of-this-worker-alone"


@pytest.fixture(autouse=True)
def workers_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is stopped for seconds on a busy machine is none that does not answer."""
    monkeypatch.setattr(module, "WORKER_LIMIT_S", 60.0)


def samples_of(families: Iterable[Family]) -> dict[str, float]:
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def worker_info(worker_id: str, **fields: Any) -> WorkerInfo:
    told = {
        "worker_id": worker_id,
        "model": "m",
        "state": "ready",
        "pid": 2,
        "port": 9300,
        "running": 0,
        "waiting": 0,
        "kv_cache_usage": 0.0,
        "worker": "cpu",
        "devices": [0],
        "started_at": "",
    }
    return msgspec.convert(told | fields, WorkerInfo)


def worker_at(folder: Path) -> Worker:
    """A worker that has no process."""
    life, _ = begin(0.0)
    return Worker("w1", Spec("m", "cpu", (0,)), life, folder / "w1.log")


async def metrics_at(url: str, folder: Path) -> bytes:
    """Ask a worker whose process answers at `url`."""
    worker = worker_at(folder)
    async with JobClient(url, token=TOKEN) as client:
        worker.running = cast(Running, SimpleNamespace(client=client))
        return await fetch_worker_metrics(worker)


def test_workers_are_counted_by_state_and_each_tells_its_requests() -> None:
    found = samples_of(
        worker_families(
            [
                worker_info("a", state="busy", running=3, waiting=2, kv_cache_usage=0.5, restarts=1),
                worker_info("b", state="failed", memory_reserved=100, memory_used=90),
            ]
        )
    )

    assert {name: value for name, value in found.items() if name.startswith("rbee_workers ") and value} == {
        "rbee_workers state=busy": 1,
        "rbee_workers state=failed": 1,
    }
    assert found["rbee_workers state=ready"] == 0
    assert found["rbee_worker_requests model=m state=running worker=a"] == 3
    assert found["rbee_worker_requests model=m state=waiting worker=a"] == 2
    assert found["rbee_worker_kv_cache_usage_ratio model=m worker=a"] == 0.5
    assert found["rbee_worker_restarts_total model=m worker=a"] == 1
    assert found["rbee_worker_memory_promised_bytes model=m worker=b"] == 100
    assert found["rbee_worker_memory_used_bytes model=m worker=b"] == 90
    assert "rbee_worker_memory_used_bytes model=m worker=a" not in found


def test_a_device_tells_what_it_knows_and_nothing_else() -> None:
    gpu = Device(
        kind="cuda",
        index=1,
        name="H200",
        uuid="GPU-1",
        memory_total=1000,
        memory_used=600,
        memory_reserved=500,
        utilization=25.0,
        temperature=60.0,
        power=300.0,
        health="degraded",
    )
    found = samples_of(device_families([gpu, Device(kind="cpu", index=0, name="CPU")]))

    assert found["rbee_device_info device=cuda:1 name=H200 uuid=GPU-1"] == 1
    assert found["rbee_device_memory_size_bytes device=cuda:1"] == 1000
    assert found["rbee_device_memory_used_bytes device=cuda:1"] == 600
    assert found["rbee_device_memory_promised_bytes device=cuda:1"] == 500
    assert found["rbee_device_utilization_ratio device=cuda:1"] == 0.25
    assert found["rbee_device_temperature_celsius device=cuda:1"] == 60
    assert found["rbee_device_power_watts device=cuda:1"] == 300
    assert found["rbee_device_health device=cuda:1 health=degraded"] == 1
    assert found["rbee_device_health device=cuda:1 health=ok"] == 0
    assert "rbee_device_power_watts device=cpu:0" not in found
    assert "rbee_device_memory_size_bytes device=cpu:0" not in found


async def test_downloaded_bytes_are_kept_when_a_download_has_ended(tmp_path: Path) -> None:
    downloads = Downloads(Models(tmp_path))
    transfer: Any = SimpleNamespace(model="m", bytes_received=700)

    async def run() -> None:
        assert (downloads.running, downloads.received_bytes) == (1, 700)
        transfer.bytes_received = 900

    transfer.run = run
    downloads._transfers["m"] = transfer
    await downloads._run(transfer)

    assert (downloads.running, downloads.received_bytes) == (0, 900)


async def test_a_workers_metrics_are_passed_on_with_its_own_token(tmp_path: Path) -> None:
    async with running({}, access=AccessConfig(token=TOKEN)) as service:
        assert b"rbee_build_info" in await metrics_at(service.url, tmp_path)


async def test_the_models_of_workers_are_labels(tmp_path: Path) -> None:
    assert model_labels([worker_at(tmp_path)]) == {"m": "m"}


async def test_a_worker_without_a_process_tells_nothing(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match="w1 is starting and has no process"):
        await fetch_worker_metrics(worker_at(tmp_path))


async def test_the_route_says_that_the_worker_is_lost(tmp_path: Path) -> None:
    workers = cast(Workers, SimpleNamespace(get=lambda worker_id: worker_at(tmp_path)))
    async with running({}, routes=[worker_metrics_route(workers)]) as service:
        answer = await service.http.get("/v1/workers/w1/metrics")
        elsewhere = await service.http.get("/v1/workers/w1/../../jobs/metrics")

    assert (answer.status_code, answer.json()["code"]) == (502, "worker_lost")
    assert elsewhere.status_code == 404


async def test_a_worker_that_does_not_answer_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match=r"did not tell its metrics: .*rbee worker logs w1"):
        await metrics_at("http://127.0.0.1:1", tmp_path)


async def test_a_worker_that_fails_to_tell_is_told_as_such(tmp_path: Path) -> None:
    async def broken(_: Request) -> Response:
        return PlainTextResponse("no", 500)

    async with running({}, extend=lambda _, app: app.router.routes.insert(0, Route("/metrics", broken))) as s:
        with pytest.raises(WorkerLost, match="answered 500"):
            await metrics_at(s.url, tmp_path)
