"""Which devices a worker gets, and the command that starts it."""

from pathlib import Path
from typing import Literal

import pytest
from msgspec import structs

from rbee_contracts.errors import InvalidRequest
from rbee_contracts.operations import WorkerSpawn
from rbee_hive.config import HiveConfig
from rbee_hive.supervisor.launch import choose_devices, command_line, environment
from rbee_hive.supervisor.machine import Policy


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
        supervision=Policy(hive_absence_s=77),
    )


def command(
    engine: Literal["vllm", "sim"], devices: list[int], *args: str, memory: tuple[str, ...] = ()
) -> list[str]:
    return command_line(
        config(engine),
        "org/name",
        args,
        worker_id="w1",
        model_path="/models/org/name",
        listen_fd=7,
        token_fd=8,
        devices=devices,
        memory_args=memory,
    )


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        ({}, {}, ("cpu", [0])),
        ({}, {0: 5, 1: 5}, ("cuda", [0])),
        ({}, {0: 5, 1: 9, 3: 9}, ("cuda", [1])),
        ({"worker": "cpu"}, {0: 5, 1: 5}, ("cpu", [0])),
        ({"device": 1}, {0: 5, 1: 5}, ("cuda", [1])),
        ({"devices": [1, 0]}, {0: 5, 1: 5}, ("cuda", [1, 0])),
    ],
)
def test_devices(asked: dict[str, object], gpus: dict[int, int], expected: tuple[str, list[int]]) -> None:
    assert choose_devices(WorkerSpawn(model="m", **asked), gpus) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [
        ({"device": 2}, {0: 5, 1: 5}),
        ({"device": 1}, {0: 5, 2: 5}),
        ({"worker": "cuda"}, {}),
        ({"worker": "cpu", "devices": [0, 1]}, {0: 5, 1: 5}),
    ],
)
def test_devices_that_are_not_there(asked: dict[str, object], gpus: dict[int, int]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        choose_devices(WorkerSpawn(model="m", **asked), gpus)  # type: ignore[arg-type]

    assert raised.value.code == "device_not_found"


def test_several_devices_set_the_tensor_parallel_size() -> None:
    assert command("vllm", [0, 1, 2, 3])[-3:] == ["--", "--tensor-parallel-size", "4"]
    assert "--tensor-parallel-size" not in command("vllm", [3])


@pytest.mark.parametrize(
    ("devices", "args", "size"),
    [
        (4, ["--pipeline-parallel-size", "2"], "2"),
        (4, ["-pp=4"], None),
        (4, ["--pipeline_parallel_size=2", "--data-parallel-size", "2"], None),
        (8, ["-dp", "2"], "4"),
        (4, ["--tensor-parallel-size", "2", "-pp", "2"], "2"),
        (4, ["-tp", "2", "-pp", "2"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_devices_are_divided_among_the_callers_other_kinds_of_parallel(
    devices: int, args: list[str], size: str | None
) -> None:
    line = command("vllm", list(range(devices)), *args)

    assert line.count("--tensor-parallel-size") == (0 if size is None else 1)
    if size is not None:
        assert line[line.index("--tensor-parallel-size") + 1] == size


def test_the_callers_arguments_come_last() -> None:
    told = ("--gpu-memory-utilization", "0.5")
    assert command("vllm", [0, 1], "--dtype", "half", memory=told)[-4:] == [*told, "--dtype", "half"]
    assert "--" not in command("sim", [0], "--sim-step-ms", "5", memory=told)


def test_a_worker_is_told_how_long_it_may_be_without_its_hive() -> None:
    line = command("sim", [0])
    assert line[line.index("--hive-absence-s") + 1] == "77"


def test_a_worker_is_told_where_traces_go() -> None:
    traced = structs.replace(config("sim"), otlp_endpoint="http://127.0.0.1:4318")
    line = command_line(traced, "m", (), worker_id="w", model_path="/m", listen_fd=7, token_fd=8, devices=[0])

    assert line[line.index("--otlp-endpoint") + 1] == "http://127.0.0.1:4318"
    assert "--otlp-endpoint" not in command("sim", [0])


def test_a_worker_sees_its_devices_only_and_no_token() -> None:
    assert environment({"A": "1"}, "2,3", "n")["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment({"A": "1", "RBEE_TOKEN": "of-the-cluster"}, "", "nonce") == {
        "A": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "",
        "RBEE_WORKER_NONCE": "nonce",
        "SPT_NOENV": "1",
    }


def test_a_worker_gets_no_token_of_the_model_hub() -> None:
    """Its model lies on this machine, and its log and its memory are seen by whoever has the worker."""
    inherited = dict.fromkeys(
        ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"), "s"
    )

    given = environment(inherited | {"HF_HOME": "/h"}, "", "n")
    assert not inherited.keys() & given.keys()
    assert given["HF_HOME"] == "/h"


def test_a_worker_does_not_hear_of_the_hives_service_manager() -> None:
    inherited = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "TMPDIR": "/run/rbee"}

    assert environment(inherited, "", "nonce").keys() & inherited.keys() == {"TMPDIR"}
