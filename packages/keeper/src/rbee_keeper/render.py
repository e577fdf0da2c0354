"""Lists as tables for people; pure."""

from collections.abc import Mapping, Sequence

from rbee_contracts.jobs import JobRecord
from rbee_contracts.nodes import (
    Device,
    HiveInfo,
    ModelFile,
    ModelInfo,
    StatusResult,
    WorkerInfo,
    WorkerProcessInfo,
    WorkerState,
)
from rbee_keeper.grid import Grid
from rbee_keeper.settings import Settings
from rbee_keeper.units import bar, duration, indices, local, memory, moment, size, with_unit

NO_WORKERS = "No workers. Start one: rbee worker spawn --model MODEL"
NO_MODELS = (
    "No models. Fetch one: rbee model download ORG/NAME, or put a model's folder into the models folder."
)
NO_HIVES = "No hives. Start one: rbee-hive --queen-url URL"
NO_PROCESSES = "No process of a worker, and nobody else's on a device."

BAR_CELLS = 16
"""The length of a memory bar in a table."""

REVISION_DIGITS = 8
"""So much of a commit is shown in a table; `model show` tells it whole."""


def headline(status: StatusResult, settings: Settings) -> str:
    """Say who answered."""
    who = f"hive {status.hives[0].hive_id}" if settings.is_hive else "queen"
    return f"rbee {who} {status.version} at {settings.url}, up {duration(status.uptime_s)}"


def status(status: StatusResult, *, is_unicode: bool = True) -> list[Grid]:
    return [
        hives(status.hives),
        devices([(h.hive_id, device) for h in status.hives for device in h.devices], is_unicode=is_unicode),
        workers([(h.hive_id, worker) for h in status.hives for worker in h.workers]),
        models([(h.hive_id, model) for h in status.hives for model in h.models]),
    ]


def of_hive(hive: HiveInfo, *, is_unicode: bool = True) -> list[Grid]:
    """List what one hive has."""
    return status(StatusResult(version="", uptime_s=0, hives=[hive]), is_unicode=is_unicode)[1:]


def hives(listed: Sequence[HiveInfo]) -> Grid:
    return Grid(
        title="Hives",
        columns=("hive", "state", "url", "workers", "models", "disk free", "labels", "last seen", "version"),
        rows=[
            (
                hive.hive_id,
                hive.state + (" (draining)" if hive.draining else ""),
                hive.url,
                str(len(hive.workers)),
                str(len(hive.models)),
                "-" if hive.disk is None else size(hive.disk.free),
                labels(hive.labels),
                "-" if hive.last_seen_s is None else duration(hive.last_seen_s),
                hive.version,
            )
            for hive in listed
        ],
        empty=NO_HIVES,
        dispensable=("version", "models", "disk free", "labels", "last seen"),
        elastic=("labels",),
        to_the_right=("workers", "models", "disk free", "last seen"),
    )


def _hive(listed: Sequence[tuple[str, object]]) -> tuple[str, ...]:
    """Say whether the column with the hive can be left out: it tells nothing where there is only one."""
    return ("hive",) if len({hive for hive, _ in listed}) <= 1 else ()


def labels(given: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" if value else name for name, value in sorted(given.items())) or "-"


def devices(listed: Sequence[tuple[str, Device]], *, is_unicode: bool = True) -> Grid:
    """List devices: memory used, promised to workers beyond that, and in all."""
    return Grid(
        title="Devices",
        columns=(
            *("device", "hive", "name", "memory", "used", "reserved", "total", "load"),
            *("temperature", "power", "processes", "health"),
        ),
        rows=[
            (
                device_name(device),
                hive,
                device.name
                + (f" ({device.cores} cores)" if device.cores else "")
                + (" MIG" if device.mig_uuid is not None else ""),
                _bar(device, is_unicode),
                memory(device.memory_used),
                memory(device.memory_reserved) if device.memory_reserved else "-",
                memory(device.memory_total),
                with_unit(device.utilization, "%"),
                with_unit(device.temperature, "°C" if is_unicode else "C"),
                with_unit(device.power, "W"),
                str(len(device.processes)) if device.kind == "cuda" else "-",
                device.health,
            )
            for hive, device in listed
        ],
        empty="No devices.",
        dispensable=("power", "temperature", "processes", *_hive(listed), "memory", "load", "reserved"),
        elastic=("name",),
        to_the_right=("used", "reserved", "total", "load", "temperature", "power", "processes"),
    )


def device_name(device: Device) -> str:
    return f"{device.kind}:{device.index}"


def _bar(device: Device, is_unicode: bool) -> str:
    if not device.memory_total or device.memory_used is None:
        return "-"
    return bar(
        device.memory_used, device.memory_reserved, device.memory_total, BAR_CELLS, is_unicode=is_unicode
    )


def workers(listed: Sequence[tuple[str, WorkerInfo]]) -> Grid:
    return Grid(
        title="Workers",
        columns=(
            *("worker", "model", "state", "hive", "device", "port", "pid", "running", "waiting", "kv"),
            *("tokens/s", "memory", "restarts"),
        ),
        rows=[
            (
                worker.worker_id,
                worker.model,
                worker.state + ending(worker),
                hive,
                f"{worker.worker}:{indices(worker.devices)}",
                str(worker.port),
                str(worker.pid),
                str(worker.running),
                str(worker.waiting),
                f"{worker.kv_cache_usage:.0%}",
                f"{worker.tokens_per_second:.0f}" if worker.tokens_per_second >= 0.5 else "-",
                memory(worker.memory_used),
                str(worker.restarts) if worker.restarts else "-",
            )
            for hive, worker in listed
        ],
        empty=NO_WORKERS,
        dispensable=(
            *("restarts", "memory", "tokens/s", *_hive(listed), "pid", "port", "kv", "waiting", "device"),
        ),
        to_the_right=("port", "pid", "running", "waiting", "kv", "tokens/s", "memory", "restarts"),
    )


def ending(worker: WorkerInfo) -> str:
    """Say how a worker ended, where it did: the signal, or the exit status.

    One that was started again still tells how it ended before; its state says that it runs.
    """
    if worker.state not in ENDED:
        return ""
    if worker.signal is not None:
        return f"({signal_name(worker.signal)})"
    return f"({worker.exit_code})" if worker.exit_code else ""


ENDED: frozenset[WorkerState] = frozenset({"failed", "stopped"})
"""The states of a worker that has no process."""


def signal_name(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def processes(listed: Sequence[tuple[str, WorkerProcessInfo]]) -> Grid:
    """List processes as the operating system sees them."""
    return Grid(
        title="Processes",
        columns=("pid", "kind", "name", "worker", "hive", "parent", "user", "memory", "devices", "started"),
        rows=[
            (
                str(process.pid),
                process.kind,
                process.name,
                process.worker_id or "-",
                hive,
                str(process.ppid),
                process.user or "-",
                memory(process.memory),
                on_devices(process),
                local(process.started_at, "%m-%d %H:%M:%S"),
            )
            for hive, process in listed
        ],
        empty=NO_PROCESSES,
        dispensable=("started", "parent", *_hive(listed), "user", "devices", "memory"),
        elastic=("name", "devices"),
        to_the_right=("pid", "parent", "memory"),
    )


def on_devices(process: WorkerProcessInfo) -> str:
    """Say which devices a process uses, and how much of their memory."""
    used = sorted(process.devices.items())
    return ", ".join(f"{i}" if taken is None else f"{i}: {memory(taken)}" for i, taken in used) or "-"


def models(listed: Sequence[tuple[str, ModelInfo]]) -> Grid:
    return Grid(
        title="Models",
        columns=(
            *("model", "hive", "size", "context", "dtype", "format", "architecture", "revision"),
            *("last used", "used by"),
        ),
        rows=[
            (
                model.model,
                hive,
                size(model.size_on_disk or model.size),
                str(model.max_model_len or "-"),
                model.dtype or "-",
                model.format,
                model.architecture or "-",
                model.revision[:REVISION_DIGITS] if model.revision else "-",
                local(model.last_used_at, "%Y-%m-%d"),
                ", ".join(model.used_by) or "-",
            )
            for hive, model in listed
        ],
        empty=NO_MODELS,
        dispensable=(
            *("revision", "architecture", "last used", *_hive(listed), "format", "dtype", "context"),
            "used by",
        ),
        elastic=("used by",),
        to_the_right=("size", "context"),
    )


def files(listed: Sequence[ModelFile]) -> Grid:
    return Grid(
        title="Files",
        columns=("file", "size", "sha256"),
        rows=[(file.path, size(file.size), file.sha256 or "-") for file in listed],
        empty="No files.",
        dispensable=("sha256",),
        elastic=("file",),
        to_the_right=("size",),
    )


def jobs(listed: Sequence[JobRecord]) -> Grid:
    return Grid(
        title="Jobs",
        columns=("job", "operation", "model", "state", "created", "took", "code"),
        rows=[
            (
                job.job_id,
                job.operation,
                job.model or "-",
                job.state,
                local(job.created_at, "%m-%d %H:%M:%S"),
                took(job),
                job.error.code if job.error else "-",
            )
            for job in listed
        ],
        empty="No jobs.",
        dispensable=("took", "created", "model", "code"),
        to_the_right=("took",),
    )


def took(job: JobRecord) -> str:
    """Say how long a job ran; `-` while it does."""
    start, end = moment(job.started_at), moment(job.finished_at)
    return "-" if start is None or end is None else duration((end - start).total_seconds())


def silence(silent: Mapping[str, str]) -> str | None:
    """Say which hives a list leaves out, and why; None where it has them all."""
    if not silent:
        return None
    return (
        "Not asked, because they do not answer: "
        + ", ".join(f"{hive} ({why.rstrip('.')})" for hive, why in silent.items())
        + "."
    )
