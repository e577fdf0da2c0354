"""Results as tables and lines for people; pure."""

from collections.abc import Sequence
from datetime import UTC, datetime

from rbee_contracts.jobs import JobRecord
from rbee_contracts.nodes import Device, HiveInfo, ModelInfo, StatusResult, WorkerInfo
from rbee_keeper.output import Grid, Output
from rbee_keeper.settings import Settings

NO_WORKERS = "No workers. Start one: rbee worker spawn --model MODEL"
NO_MODELS = "No models. Put a model's folder into the models folder of a hive."
NO_HIVES = "No hives. Start one: rbee-hive --queen-url URL"


def headline(status: StatusResult, settings: Settings) -> str:
    """Say who answered."""
    who = f"hive {status.hives[0].hive_id}" if settings.is_hive else "queen"
    return f"rbee {who} {status.version} at {settings.url}, up {duration(status.uptime_s)}"


def status(status: StatusResult) -> list[Grid]:
    return [
        hives(status.hives),
        devices([(hive.hive_id, device) for hive in status.hives for device in hive.devices]),
        workers([(hive.hive_id, worker) for hive in status.hives for worker in hive.workers]),
        models([(hive.hive_id, model) for hive in status.hives for model in hive.models]),
    ]


def hives(listed: Sequence[HiveInfo]) -> Grid:
    return Grid(
        title="Hives",
        columns=("hive", "state", "url", "workers", "last seen", "version"),
        rows=[
            (
                hive.hive_id,
                hive.state,
                hive.url,
                str(len(hive.workers)),
                "-" if hive.last_seen_s is None else f"{hive.last_seen_s:.0f}s",
                hive.version,
            )
            for hive in listed
        ],
        empty=NO_HIVES,
    )


def devices(listed: Sequence[tuple[str, Device]]) -> Grid:
    return Grid(
        title="Devices",
        columns=("device", "hive", "name", "memory", "load", "temperature", "power"),
        rows=[
            (
                f"{device.kind}:{device.index}",
                hive,
                device.name + (f" ({device.cores} cores)" if device.cores else ""),
                _memory(device),
                _unit(device.utilization, "%"),
                _unit(device.temperature, "°C"),
                _unit(device.power, "W"),
            )
            for hive, device in listed
        ],
        empty="No devices.",
    )


def workers(listed: Sequence[tuple[str, WorkerInfo]]) -> Grid:
    return Grid(
        title="Workers",
        columns=("worker", "model", "state", "hive", "device", "port", "pid", "running", "waiting", "kv"),
        rows=[
            (
                worker.worker_id,
                worker.model,
                worker.state + (f"({worker.exit_code})" if worker.exit_code else ""),
                hive,
                f"{worker.worker}:{','.join(map(str, worker.devices))}",
                str(worker.port),
                str(worker.pid),
                str(worker.running),
                str(worker.waiting),
                f"{worker.kv_cache_usage:.0%}",
            )
            for hive, worker in listed
        ],
        empty=NO_WORKERS,
    )


def models(listed: Sequence[tuple[str, ModelInfo]]) -> Grid:
    return Grid(
        title="Models",
        columns=("model", "hive", "size", "context", "dtype", "architecture"),
        rows=[
            (
                model.model,
                hive,
                size(model.size),
                str(model.max_model_len or "-"),
                model.dtype or "-",
                model.architecture or "-",
            )
            for hive, model in listed
        ],
        empty=NO_MODELS,
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
                _local(job.created_at, "%m-%d %H:%M:%S"),
                _took(job),
                job.error.code if job.error else "-",
            )
            for job in listed
        ],
        empty="No jobs.",
    )


def record(job: JobRecord) -> list[str]:
    """Say all there is to say of one job, a line each."""
    usage = job.usage
    lines = {
        "job": job.job_id,
        "operation": job.operation,
        "model": job.model,
        "state": job.state,
        "error": f"{job.error.message} ({job.error.code})" if job.error else None,
        "created": _local(job.created_at),
        "started": _local(job.started_at),
        "finished": _local(job.finished_at),
        "took": _took(job),
        "tokens": f"{usage.prompt_tokens} in, {usage.completion_tokens} out" if usage else None,
        "correlation": job.correlation_id,
        "children": ", ".join(job.children),
    }
    return [f"{name:12}{value}" for name, value in lines.items() if value and value != "-"]


def tell_silent(out: Output, silent: Sequence[str]) -> None:
    """Say which hives a list leaves out."""
    if silent:
        out.say(f"Not asked, because they do not answer: {', '.join(silent)}.", style="yellow")


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if hours == 0:
        return f"{minutes}m {int(seconds % 60)}s"
    return f"{hours}h {minutes % 60}m" if days == 0 else f"{days}d {hours % 24}h"


def _memory(device: Device) -> str:
    if device.memory_total is None:
        return "-"
    total = f"{device.memory_total / 2**30:.0f} GiB"
    return total if device.memory_used is None else f"{device.memory_used / 2**30:.1f} of {total}"


def _unit(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.0f} {unit}"


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _local(text: str | None, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    moment = _moment(text)
    if moment is None:
        return text or "-"
    here = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone()
    return here.strftime(form)


def _took(job: JobRecord) -> str:
    start, end = _moment(job.started_at), _moment(job.finished_at)
    return "-" if start is None or end is None else duration((end - start).total_seconds())
