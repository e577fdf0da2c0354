"""How a worker is launched: which devices, which command, which environment. Pure."""

import sys
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from rbee_contracts.access import NONCE_VARIABLE, TOKEN_FILE_VARIABLE, TOKEN_VARIABLE
from rbee_contracts.errors import InvalidRequest
from rbee_contracts.operations import WorkerSpawn
from rbee_hive.config import HiveConfig
from rbee_hive.devices import tensor_parallel
from rbee_job_server.systemd import NOTIFY_VARIABLES

WORKER_HOST = "127.0.0.1"

NOT_FOR_WORKERS = frozenset(
    {
        *(TOKEN_VARIABLE, TOKEN_FILE_VARIABLE),
        *("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"),
        *NOTIFY_VARIABLES,
    }
)
"""The cluster's token, and those for the model hub: a worker's model lies on this machine. And what
the service manager has told the hive: it hears nobody else."""

DeviceKind: TypeAlias = Literal["cuda", "cpu"]


def choose_devices(op: WorkerSpawn, gpus: Mapping[int, int]) -> tuple[DeviceKind, list[int]]:
    """Give the kind and the indexes of the devices a worker gets.

    By default that is the GPU with the most memory left to promise, else the CPU.

    Args:
        gpus: those that work, each with the bytes that are left.

    Raises:
        InvalidRequest: it names a device that is not there.
    """
    kind: DeviceKind = op.worker or ("cuda" if gpus else "cpu")
    there = sorted(gpus) if kind == "cuda" else [0]
    if op.devices is not None:
        asked = op.devices
    elif op.device is not None:
        asked = [op.device]
    else:
        asked = [max(there, key=lambda index: (gpus.get(index, 0), -index), default=0)]
    missing = [index for index in asked if index not in there]
    if missing:
        raise InvalidRequest(
            f"This hive has {len(there)} {kind} device{'' if len(there) == 1 else 's'}; "
            f"there is no {kind} device {missing[0]} that works. See: rbee device list",
            code="device_not_found",
        )
    return kind, asked


def command_line(
    config: HiveConfig,
    model: str,
    worker_args: Sequence[str],
    *,
    worker_id: str,
    model_path: str,
    listen_fd: int,
    token_fd: int,
    devices: Sequence[int],
    memory_args: Sequence[str] = (),
) -> list[str]:
    """Give the command that starts a worker. Several devices set the tensor-parallel size, divided by the
    caller's pipeline-parallel and data-parallel sizes.

    `worker_args`, the caller's, come last, so they win over `memory_args`, which the hive adds.
    """
    command = [sys.executable, "-m", "rbee_worker", "--model", model_path, "--served-model-name", model]
    command += ["--worker-id", worker_id, "--listen-fd", str(listen_fd), "--token-fd", str(token_fd)]
    command += ["--engine", config.worker_engine, "--log-level", config.log_level]
    command += ["--max-body-bytes", str(config.limits.max_body_bytes)]
    command += ["--hive-absence-s", f"{config.supervision.hive_absence_s:g}"]
    if config.otlp_endpoint is not None:
        command += ["--otlp-endpoint", config.otlp_endpoint]
    if config.worker_engine == "sim":
        return [*command, *worker_args]
    size = tensor_parallel(worker_args, len(devices))
    parallel = [] if size is None or size == 1 else ["--tensor-parallel-size", str(size)]
    return [*command, "--", *parallel, *memory_args, *worker_args]


def environment(inherited: Mapping[str, str], visible: str, nonce: str) -> dict[str, str]:
    """Show the worker its devices only, and no token of others; mark it, and what it starts, as ours.

    NVML counts in PCI order; CUDA by default does not. vLLM's engine processes give themselves titles, which
    would be written over the environment that the nonce is read from, but for `SPT_NOENV`.

    Args:
        visible: the worker's GPUs, as `CUDA_VISIBLE_DEVICES`; empty for none.
    """
    kept = {name: value for name, value in inherited.items() if name not in NOT_FOR_WORKERS}
    return kept | {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": visible,
        NONCE_VARIABLE: nonce,
        "SPT_NOENV": "1",
    }
