"""Models that a hive loads by itself, with a real hive."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import anyio
import httpx
import pytest
from rbee_processes import MODELS, Service, marked_processes, until

from rbee_contracts.access import NONCE_VARIABLE
from rbee_contracts.errors import Unavailable
from rbee_contracts.nodes import WorkerInfo, WorkerState
from rbee_contracts.operations import ModelLoad
from rbee_hive.preload import Preload
from rbee_job_server import JobServer, Submission
from rbee_job_server.jobs import Job

pytestmark = pytest.mark.timeout(180)

LOADING = f"""
import os
if {NONCE_VARIABLE!r} in os.environ:
    open({{gate!r}}).read()
"""
"""A worker that begins with this loads until somebody writes to the pipe `gate`."""


@contextmanager
def hive(folder: Path, *models: str, engine: str = "sim") -> Iterator[Service]:
    marker = f"preload-{os.getpid()}-{folder.name}"
    args = ["--config", "none", "--port", "0", "--queen-url", "none", "--worker-engine", engine]
    args += ["--models-dir", str(MODELS), "--state-dir", str(folder / "state")]
    for model in models:
        args += ["--preload", model]
    service = Service("rbee-hive", args, folder / "hive.log", marker)
    try:
        yield service
    finally:
        service.terminate()
        until(lambda: not marked_processes(marker), "nothing is left", 15)


def readiness(service: Service) -> dict[str, Any]:
    answer = httpx.get(f"{service.url}/ready", timeout=45)
    found: dict[str, Any] = answer.json()
    assert found["ready"] == (answer.status_code == 200)
    return found


def test_a_hive_is_ready_once_what_it_preloads_has_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    (tmp_path / "sitecustomize.py").write_text(LOADING.format(gate=str(gate)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with hive(tmp_path, "rbee-tiny", "rbee-tiny") as service:
        before = readiness(service)
        gate.write_text("go on")
        until(lambda: readiness(service)["ready"], "the hive is ready")

        def jobs() -> list[tuple[str, str]]:
            found = httpx.get(f"{service.url}/v1/jobs", timeout=45).json()["jobs"]
            return [(job["operation"], job["state"]) for job in found]

        assert (before["ready"], before["reason"]) == (False, "rbee-tiny is being loaded")
        until(lambda: jobs() == [("model_load", "completed")], "its one job has ended")


def test_a_hive_that_cannot_preload_a_model_says_why_and_what_to_do(tmp_path: Path) -> None:
    with hive(tmp_path, "org/nowhere", engine="vllm") as service:
        until(lambda: "could not" in readiness(service)["reason"], "the load has failed")
        reason = readiness(service)["reason"]

        assert reason.startswith("org/nowhere could not be loaded: ")
        assert "Models here: rbee-tiny." in reason
        assert reason.endswith("When that is mended: rbee model load org/nowhere")
        assert httpx.get(f"{service.url}/health", timeout=45).status_code == 200


class Refusing:
    """Stands in for a job server that takes nothing; knows what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def submit(self, submission: Submission) -> Job:
        assert isinstance(submission.operation, ModelLoad)
        self.asked.append(submission.operation.model)
        raise Unavailable("The hive drains; it takes nothing new.")


def worker(model: str, state: WorkerState) -> WorkerInfo:
    return WorkerInfo(
        worker_id=f"{model}-1",
        model=model,
        state=state,
        pid=1,
        port=9300,
        running=0,
        waiting=0,
        kv_cache_usage=0.0,
        worker="cpu",
        devices=[],
        started_at="2026-01-01T00:00:00Z",
    )


@pytest.mark.anyio
async def test_only_what_no_worker_of_the_hive_before_has_or_loads_is_asked_for() -> None:
    server = Refusing()
    workers = [worker("there", "ready"), worker("coming", "starting"), worker("gone", "failed")]
    preload = Preload(["there", "coming", "gone", "new"], cast("JobServer", server), lambda: workers)
    with anyio.move_on_after(0):
        await preload.run()

    assert server.asked == ["gone", "new"]
    assert preload.not_ready() == "coming is being loaded"
    workers[1] = worker("coming", "ready")
    assert preload.not_ready() == (
        "gone could not be loaded: The hive drains; it takes nothing new. "
        "When that is mended: rbee model load gone"
    )
