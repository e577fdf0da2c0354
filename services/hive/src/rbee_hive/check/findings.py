"""What the check of a hive makes of the facts: findings, each with what to do where it is not ok. Pure."""

import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from rbee_contracts.errors import RbeeError, Unauthorized
from rbee_contracts.nodes import Device, Finding, ServiceInfo
from rbee_hive.check.facts import QUEEN_S, READ_S, DiskFacts, EngineFacts
from rbee_hive.config import PortRange
from rbee_hive.devices.sizes import show_bytes

GIB = 1 << 30

LOW_DISK_BYTES = 20 * GIB
"""Free space in the models folder below which the check warns: a model of some 8 billion weights is 16 GB."""

FULL_DISK_BYTES = GIB
"""Free space below which no model comes in."""

LOW_MEMORY_BYTES = 2 * GIB
"""Free memory of a device below which the check warns: a worker alone takes about one."""

LOW_SHM_BYTES = GIB
"""Size of /dev/shm below which the check warns: the processes of one engine speak through it."""

FEW_PORTS = 8
"""Free ports below which the check warns."""


def of_engine(facts: EngineFacts, *, is_sim: bool) -> Iterator[Finding]:
    """Judge whether workers can be started at all."""
    python = ".".join(map(str, sys.version_info[:3]))
    if is_sim:
        yield _ok("engine", f"Workers model a GPU engine (sim); vLLM is not needed. Python is {python}.")
    elif facts.vllm is None:
        yield _failed(
            "engine",
            f"vLLM is not installed for this Python ({python}), so no worker can start.",
            "Install it, for GPUs or for the CPU: make setup ENGINE=cuda, or ENGINE=cpu.",
        )
    else:
        yield _ok("engine", f"vLLM {facts.vllm} with torch {facts.torch or 'unknown'} on Python {python}.")


def of_driver(
    facts: EngineFacts, *, driver: str | None, cuda: str | None, why_none: str | None, gpus: int, is_sim: bool
) -> Iterator[Finding]:
    """Judge whether the GPUs' driver and the engine fit each other."""
    if driver is None:
        what = f"NVML is not to be had ({why_none}), so the CPU is the only device."
        if facts.torch_cuda is not None and not is_sim:
            yield _failed(
                "driver",
                f"{what} The engine is built for CUDA {facts.torch_cuda} and cannot run on a CPU.",
                "Install the GPU's driver, or the engine for the CPU: make setup ENGINE=cpu.",
            )
        else:
            yield _ok("driver", what)
        return
    message = f"NVIDIA driver {driver}, which runs CUDA up to {cuda or 'unknown'}; {gpus} GPUs are used."
    if facts.torch is not None and facts.torch_cuda is None and gpus and not is_sim:
        yield _failed(
            "driver",
            f"{message} The engine is built for the CPU and leaves them idle.",
            "Install the engine for GPUs: make setup ENGINE=cuda.",
        )
    elif facts.torch_cuda is not None and cuda is not None and _version(facts.torch_cuda) > _version(cuda):
        is_other_major = _version(facts.torch_cuda)[0] > _version(cuda)[0]
        yield Finding(
            check="driver",
            status="failed" if is_other_major else "warning",
            message=f"{message} The engine is built for CUDA {facts.torch_cuda}.",
            remedy=f"Install a driver that runs CUDA {facts.torch_cuda}.",
        )
    else:
        yield _ok("driver", message)


def of_devices(devices: Sequence[Device] | None) -> Iterator[Finding]:
    """Judge each device's health and how much of its memory is free."""
    if devices is None:
        yield _failed(
            "devices",
            f"The devices have not answered for {READ_S:g} s: the GPU's driver hangs.",
            "See dmesg for Xid errors; restart the machine if nvidia-smi hangs too.",
        )
        return
    for device in devices:
        yield from _of_device(device)


def _of_device(device: Device) -> Iterator[Finding]:
    name = f"{device.kind}:{device.index}"
    if device.health != "ok":
        yield Finding(
            check=name,
            status="failed" if device.health == "failed" else "warning",
            message=f"{device.name} is {device.health}: {' '.join(device.issues)}",
            remedy="Do what is said there; until then give it no work: --ignore-device "
            + str(device.uuid or device.index),
        )
    if device.memory_total is None or device.memory_used is None:
        if device.health == "ok":
            yield _ok(name, f"{device.name} does not tell its memory.")
        return
    free = device.memory_total - device.memory_used
    message = f"{device.name}: {show_bytes(free)} of {show_bytes(device.memory_total)} are free."
    if free >= LOW_MEMORY_BYTES:
        yield _ok(name, message)
    else:
        yield _warning(name, message, "Stop a worker there, or what else uses it: rbee worker list.")


def of_models(facts: DiskFacts | None, roots: Sequence[tuple[Path, DiskFacts | None]]) -> Iterator[Finding]:
    """Judge the models folder and the further folders with models; None is one whose disk hangs."""
    if facts is None:
        yield _hanging("models", "the models folder")
    elif not facts.is_writable:
        what = "cannot be written to" if facts.exists else "is not there and cannot be made"
        yield _failed(
            "models",
            f"The models folder {facts.path} {what}.",
            "Give it to the user that runs the hive, or choose another one: --models-dir.",
        )
    else:
        yield from _of_space(facts)
    for path, root in roots:
        if root is None:
            yield _hanging("models", str(path))
        elif not root.exists:
            yield _warning(
                "models", f"The folder {path} is not there.", "Mount it, or take it out of model_roots."
            )


def _of_space(facts: DiskFacts) -> Iterator[Finding]:
    if facts.free is None or facts.total is None:
        yield _ok("models", f"The models folder {facts.path} is made at the first download.")
        return
    message = f"{show_bytes(facts.free)} of {show_bytes(facts.total)} are free in {facts.path}."
    remedy = "Delete models that are not used (rbee model delete), or choose another disk: --models-dir."
    if facts.free < FULL_DISK_BYTES:
        yield _failed("models", message, remedy)
    elif facts.free < LOW_DISK_BYTES:
        yield _warning("models", message, remedy)
    else:
        yield _ok("models", message)


def of_state(facts: DiskFacts | None) -> Iterator[Finding]:
    """Judge the folder in which workers' records and logs are kept."""
    if facts is None:
        yield _hanging("state", "the state folder")
    elif facts.is_writable:
        yield _ok("state", f"Records and logs are kept in {facts.path}.")
    else:
        yield _failed(
            "state",
            f"Records and logs cannot be kept in {facts.path}: it cannot be written to.",
            "Give it to the user that runs the hive, or choose another one: --state-dir.",
        )


def of_ports(ports: PortRange, free: int) -> Iterator[Finding]:
    """Judge the ports that workers get."""
    message = f"{free} of the ports {ports.first} to {ports.last} are free for workers."
    remedy = "Stop what listens there, or choose others: --worker-first-port, --worker-last-port."
    if free == 0:
        yield _failed("ports", message, remedy)
    elif free < FEW_PORTS:
        yield _warning("ports", message, remedy)
    else:
        yield _ok("ports", message)


def of_queen(url: str | None, info: ServiceInfo | None, error: RbeeError | None) -> Iterator[Finding]:
    """Judge the way to the queen."""
    if url is None:
        yield _ok("queen", "This hive is on its own; it has no queen.")
    elif info is not None and info.name != "queen":
        yield _failed(
            "queen", f"A {info.name} answers at {url}, and no queen.", "Set the queen's address: --queen-url."
        )
    elif info is not None:
        yield _ok("queen", f"The queen ({info.version}) answers at {url}.")
    elif error is not None and error.code == Unauthorized.default_code:
        yield _failed(
            "queen",
            f"The queen at {url} refuses this hive's token.",
            "Give both the same token: RBEE_TOKEN, or --token-file.",
        )
    else:
        details = f": {error.details}" if error is not None else f" within {QUEEN_S:g} s."
        yield _failed(
            "queen",
            f"The queen does not answer at {url}{details}",
            "See whether rbee-queen runs there and can be reached, or set its address: --queen-url.",
        )


def of_hub(endpoint: str, failure: str | None) -> Iterator[Finding]:
    """Judge the way to the model hub, without which everything but downloads works."""
    if failure is None:
        yield _ok("hub", f"The model hub answers at {endpoint}.")
    else:
        yield _warning(
            "hub",
            f"The model hub does not answer at {endpoint}: {failure}. Models cannot be downloaded from it.",
            "Set another one (--hub-endpoint), or take models from other hives or put them into the folder.",
        )


def of_open_files(limit: int | None, needed: int) -> Iterator[Finding]:
    """Judge how many files and connections the hive may have open. `limit` None: any number."""
    if limit is None or limit >= needed:
        allowed = "any number of" if limit is None else str(limit)
        yield _ok("open files", f"The hive may open {allowed} files.")
    else:
        yield _warning(
            "open files",
            f"The hive may open {limit} files; with all its connections in use it needs {needed}.",
            "Raise it: ulimit -n, or LimitNOFILE= of the service.",
        )


def of_shm(size: int | None) -> Iterator[Finding]:
    """Judge the shared memory through which the processes of one engine speak."""
    if size is None:
        yield _warning("shared memory", "There is no /dev/shm.", "Mount a tmpfs there.")
    elif size < LOW_SHM_BYTES:
        yield _warning(
            "shared memory",
            f"/dev/shm has {show_bytes(size)}; an engine on several GPUs needs more.",
            "In a container: --shm-size 8g, or --ipc host.",
        )
    else:
        yield _ok("shared memory", f"/dev/shm has {show_bytes(size)}.")


def of_clock(now: datetime) -> Iterator[Finding]:
    """Tell what the clock says."""
    yield _ok("clock", f"It says {now.isoformat(timespec='seconds')}. Nothing is decided by that.")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)) or (0,)


def _ok(check: str, message: str) -> Finding:
    return Finding(check=check, status="ok", message=message)


def _warning(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, status="warning", message=message, remedy=remedy)


def _failed(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, status="failed", message=message, remedy=remedy)


def _hanging(check: str, what: str) -> Finding:
    return _failed(
        check,
        f"A look at {what} has not ended for {READ_S:g} s: its disk hangs.",
        "See whether it is mounted.",
    )
