"""Which devices a worker gets, and the command that starts it."""

from pathlib import Path
from typing import Literal

import pytest

from rbee_contracts.errors import InvalidRequest
from rbee_contracts.operations import WorkerSpawn
from rbee_hive.config import HiveConfig
from rbee_hive.launch import choose_devices, command_line, environment


def config(engine: Literal["vllm", "sim"] = "vllm") -> HiveConfig:
    return HiveConfig(
        hive_id="box1",
        host="127.0.0.1",
        port=7835,
        queen_url=None,
        models_dir=Path("/models"),
        state_dir=Path("/state"),
        drain_timeout_s=30,
        log_level="info",
        worker_engine=engine,
    )


def command(engine: Literal["vllm", "sim"], devices: list[int], *args: str) -> list[str]:
    op = WorkerSpawn(model="org/name", worker_args=list(args))
    return command_line(
        config(engine),
        op,
        worker_id="w1",
        model_path="/models/org/name",
        listen_fd=7,
        token_fd=8,
        devices=devices,
    )


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        ({}, 0, ("cpu", [0])),
        ({}, 2, ("cuda", [0])),
        ({"worker": "cpu"}, 2, ("cpu", [0])),
        ({"device": 1}, 2, ("cuda", [1])),
        ({"devices": [1, 0]}, 2, ("cuda", [1, 0])),
    ],
)
def test_devices(asked: dict[str, object], gpus: int, expected: tuple[str, list[int]]) -> None:
    assert choose_devices(WorkerSpawn(model="m", **asked), gpus) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [({"device": 2}, 2), ({"worker": "cuda"}, 0), ({"worker": "cpu", "devices": [0, 1]}, 4)],
)
def test_devices_that_are_not_there(asked: dict[str, object], gpus: int) -> None:
    with pytest.raises(InvalidRequest) as raised:
        choose_devices(WorkerSpawn(model="m", **asked), gpus)  # type: ignore[arg-type]

    assert raised.value.code == "device_not_found"


def test_several_devices_set_the_tensor_parallel_size() -> None:
    assert command("vllm", [0, 1, 2, 3])[-3:] == ["--", "--tensor-parallel-size", "4"]
    assert "--tensor-parallel-size" not in command("vllm", [3])


def test_the_callers_arguments_come_last() -> None:
    assert command("vllm", [0, 1], "--dtype", "half")[-2:] == ["--dtype", "half"]
    assert "--" not in command("sim", [0], "--sim-step-ms", "5")


def test_a_worker_sees_its_devices_only_and_no_token() -> None:
    assert environment({"A": "1"}, "cuda", [2, 3])["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment({}, "cuda", [2])["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert environment({"A": "1", "RBEE_TOKEN": "of-the-cluster"}, "cpu", [0]) == {
        "A": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "",
    }
