"""How a worker is launched: which devices, which command, which environment. Pure."""

import sys
from collections.abc import Mapping
from typing import Literal, TypeAlias

from rbee_contracts.access import TOKEN_VARIABLE
from rbee_contracts.errors import InvalidRequest
from rbee_contracts.operations import WorkerSpawn
from rbee_hive.config import HiveConfig

WORKER_HOST = "127.0.0.1"

DeviceKind: TypeAlias = Literal["cuda", "cpu"]


def choose_devices(op: WorkerSpawn, gpu_count: int) -> tuple[DeviceKind, list[int]]:
    """Give the kind and the indexes of the devices a worker gets: by default the first GPU, else the CPU.

    Raises:
        InvalidRequest: it names a device that is not there.
    """
    kind: DeviceKind = op.worker or ("cuda" if gpu_count else "cpu")
    asked = op.devices if op.devices is not None else [op.device if op.device is not None else 0]
    there = gpu_count if kind == "cuda" else 1
    missing = [index for index in asked if index >= there]
    if missing:
        raise InvalidRequest(
            f"This hive has {there} {kind} device{'' if there == 1 else 's'}; "
            f"there is no {kind} device {missing[0]}. See: rbee device list",
            code="device_not_found",
        )
    return kind, asked


def command_line(
    config: HiveConfig,
    op: WorkerSpawn,
    *,
    worker_id: str,
    model_path: str,
    listen_fd: int,
    token_fd: int,
    devices: list[int],
) -> list[str]:
    """Give the command that starts a worker. Several devices set the tensor-parallel size.

    The caller's `worker_args` come last, so they win.
    """
    command = [sys.executable, "-m", "rbee_worker", "--model", model_path, "--served-model-name", op.model]
    command += ["--worker-id", worker_id, "--listen-fd", str(listen_fd), "--token-fd", str(token_fd)]
    command += ["--engine", config.worker_engine, "--log-level", config.log_level]
    command += ["--max-body-bytes", str(config.limits.max_body_bytes)]
    if config.worker_engine == "sim":
        return command + op.worker_args
    parallel = ["--tensor-parallel-size", str(len(devices))] if len(devices) > 1 else []
    return [*command, "--", *parallel, *op.worker_args]


def environment(inherited: Mapping[str, str], kind: DeviceKind, devices: list[int]) -> dict[str, str]:
    """Show the worker its devices only, and not the cluster's token.

    NVML counts in PCI order; CUDA by default does not.
    """
    visible = ",".join(map(str, devices)) if kind == "cuda" else ""
    kept = {name: value for name, value in inherited.items() if name != TOKEN_VARIABLE}
    return kept | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
