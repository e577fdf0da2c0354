"""Models that a hive loads by itself, with a real hive."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from rbee_processes import MODELS, Service, marked_processes, until


@contextmanager
def hive(folder: Path, *models: str, engine: str = "sim") -> Iterator[Service]:
    marker = f"preload-{folder.name}"
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
    answer = httpx.get(f"{service.url}/ready")
    found: dict[str, Any] = answer.json()
    assert found["ready"] == (answer.status_code == 200)
    return found


def test_a_hive_is_ready_once_what_it_preloads_has_a_worker(tmp_path: Path) -> None:
    with hive(tmp_path, "rbee-tiny", "rbee-tiny") as service:
        reasons = set()

        def is_ready() -> bool:
            answer = readiness(service)
            reasons.add(answer.get("reason"))
            return bool(answer["ready"])

        until(is_ready, "the hive is ready")
        jobs = httpx.get(f"{service.url}/v1/jobs").json()["jobs"]

        assert reasons == {"rbee-tiny is being loaded", None}
        assert [(job["operation"], job["state"]) for job in jobs] == [("model_load", "completed")]


def test_a_hive_that_cannot_preload_a_model_says_why_and_what_to_do(tmp_path: Path) -> None:
    with hive(tmp_path, "org/nowhere", engine="vllm") as service:
        until(lambda: "could not" in readiness(service)["reason"], "the load has failed")
        reason = readiness(service)["reason"]

        assert reason.startswith("org/nowhere could not be loaded: ")
        assert "Models here: rbee-tiny." in reason
        assert reason.endswith("When that is mended: rbee model load org/nowhere")
        assert httpx.get(f"{service.url}/health").status_code == 200


def test_a_model_that_a_worker_of_the_hive_before_is_loading_is_not_loaded_again(tmp_path: Path) -> None:
    marker = f"preload-{tmp_path.name}"
    with hive(tmp_path, "rbee-tiny") as before:

        def started() -> list[int]:
            return [line["pid"] for line in before.log() if line["event"] == "worker_started"]

        until(started, "the worker is there")
        (worker,) = started()
        os.kill(worker, signal.SIGSTOP)
        try:
            assert before.terminate(signal.SIGUSR1) == 0
            with hive(tmp_path, "rbee-tiny") as after:
                assert readiness(after)["reason"] == "rbee-tiny is being loaded"
                os.kill(worker, signal.SIGCONT)
                until(lambda: readiness(after)["ready"], "the hive is ready")

                assert httpx.get(f"{after.url}/v1/jobs").json()["jobs"] == []
                assert {process.pid for process in marked_processes(marker)} == {worker, after.process.pid}
        finally:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
