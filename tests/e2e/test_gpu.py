"""What only a GPU can show: NVML's values, memory by process, two models on one GPU. Skipped without one."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from rbee_processes import Cluster, until

from rbee_hive.devices import Devices

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

GIB = 1 << 30

HOLDS_ONE_GIB = """
import torch
held = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("held", flush=True)
input()
"""


def why_no_gpu() -> str | None:
    devices = Devices()
    devices.open()
    try:
        if not devices.working_gpus:
            return f"no GPU here: {devices.why_no_nvml or 'NVML lists none that works'}"
    finally:
        devices.close()
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch is not built for this GPU"


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    """Skip without a GPU that torch can use."""
    reason = why_no_gpu()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def own_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("gpu")) as cluster:
        yield cluster


def test_a_process_and_its_memory_are_seen() -> None:
    devices = Devices()
    devices.open()
    before = devices.read()[0]
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS_ONE_GIB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        grown = (before.memory_used or 0) + GIB
        until(lambda: (devices.read()[0].memory_used or 0) >= grown, "the memory is in use")
        told = {process.pid: process.memory for process in devices.read()[0].processes}

        # In a container the driver tells no process, or those of the machine.
        assert (told.get(child.pid) or GIB) >= GIB
    finally:
        child.communicate("\n")
        devices.close()


def test_two_models_fit_on_one_gpu_when_each_is_given_its_cache(own_cluster: Cluster) -> None:
    spawned = [
        own_cluster.spawn("rbee-tiny", "--kv-cache-memory-bytes", "1G", "--enforce-eager") for _ in range(2)
    ]

    listed: dict[str, Any] = {
        worker["worker_id"]: worker for worker in own_cluster.run({"operation": "worker_list"})["workers"]
    }
    for worker_id in (worker["worker_id"] for worker in spawned):
        worker = listed[worker_id]
        assert (worker["state"], worker["worker"]) == ("ready", "cuda")
        estimate = worker["memory_estimate"]
        assert worker["memory_reserved"] == estimate["weights"] + GIB + estimate["overhead"]
        used = worker.get("memory_used")
        assert used is None or GIB < used <= worker["memory_reserved"], json.dumps(worker)


def test_what_is_promised_is_not_promised_again(own_cluster: Cluster) -> None:
    events = own_cluster.events(
        {
            "operation": "worker_spawn",
            "model": "rbee-tiny",
            "hive_id": own_cluster.hive_id,
            "worker_args": ["--gpu-memory-utilization", "1.0"],
        }
    )

    assert [event["code"] for event in events if event["action"] == "error"] == ["no_device_memory"]
