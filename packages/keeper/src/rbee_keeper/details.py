"""All that is known of one thing, as facts for people; pure."""

from collections.abc import Sequence

from rbee_contracts.jobs import JobRecord
from rbee_contracts.nodes import (
    Device,
    Finding,
    HiveInfo,
    MemoryEstimate,
    ModelInfo,
    WorkerInfo,
    WorkerProcessInfo,
)
from rbee_keeper.render import ENDED, device_name, labels, on_devices, signal_name, took
from rbee_keeper.units import count, indices, local, memory, size, with_unit

Facts = list[tuple[str, str]]


def _told(facts: Sequence[tuple[str, str | None]]) -> Facts:
    """Leave out what is not known."""
    return [(label, value) for label, value in facts if value is not None and value not in ("", "-")]


def job(job: JobRecord) -> Facts:
    usage = job.usage
    return _told(
        [
            ("job", job.job_id),
            ("operation", job.operation),
            ("model", job.model),
            ("state", job.state),
            ("error", f"{job.error.message} ({job.error.code})" if job.error else None),
            ("created", local(job.created_at)),
            ("started", local(job.started_at)),
            ("finished", local(job.finished_at)),
            ("took", took(job)),
            ("tokens", f"{usage.prompt_tokens} in, {usage.completion_tokens} out" if usage else None),
            ("correlation", job.correlation_id),
            ("children", ", ".join(job.children)),
        ]
    )


def worker(hive: str | None, worker: WorkerInfo) -> Facts:
    """Tell a worker's state and how it came to it, what it does, and what it takes."""
    return _told(
        [
            ("worker", worker.worker_id),
            ("state", worker.state),
            *_end(worker),
            ("restarts", str(worker.restarts) if worker.restarts else None),
            ("model", worker.model),
            ("context", with_unit(worker.max_model_len, "tokens")),
            ("hive", hive),
            ("devices", f"{worker.worker}:{indices(worker.devices)}"),
            ("port", str(worker.port)),
            ("pid", str(worker.pid)),
            ("started", local(worker.started_at)),
            ("adopted", "yes: it is older than its hive's process" if worker.adopted else None),
            ("requests", f"{worker.running} running, {worker.waiting} waiting"),
            ("KV cache", f"{worker.kv_cache_usage:.0%} in use"),
            ("prefix hits", None if (hit := worker.prefix_cache_hit_rate) is None else f"{hit:.0%}"),
            ("output", f"{worker.tokens_per_second:.1f} tokens/s" if worker.tokens_per_second else None),
            *worker_memory(worker),
        ]
    )


def _end(worker: WorkerInfo) -> list[tuple[str, str | None]]:
    """Tell how a worker ended; of one that runs again, how it ended before."""
    signalled = None if worker.signal is None else signal_name(worker.signal)
    status = None if worker.exit_code is None else str(worker.exit_code)
    if worker.state in ENDED:
        return [("cause", worker.cause), ("ended by", signalled), ("exit status", status)]
    how = signalled or (None if status is None else f"exit status {status}")
    return [("ended before", ", ".join(filter(None, [how, worker.cause])))]


def worker_memory(worker: WorkerInfo) -> list[tuple[str, str | None]]:
    """Compare what a worker was thought to need, what is promised to it and what it takes."""
    estimate = worker.memory_estimate
    return [
        (
            "memory",
            None if worker.memory_used is None else f"{memory(worker.memory_used)} used{_off(worker)}",
        ),
        ("reserved", memory(worker.memory_reserved)),
        ("estimate", None if estimate is None else _estimate(estimate)),
    ]


def _estimate(estimate: MemoryEstimate) -> str:
    parts = f"weights {memory(estimate.weights)}, KV cache {memory(estimate.kv_cache)}"
    return f"{memory(estimate.total)} ({parts}, engine {memory(estimate.overhead)})"


def _off(worker: WorkerInfo) -> str:
    """Say how far the estimate was from what is really used."""
    estimate = worker.memory_estimate
    if estimate is None or worker.memory_used is None or estimate.total == 0:
        return ""
    difference = worker.memory_used - estimate.total
    if difference == 0:
        return ", as estimated"
    words = "more" if difference > 0 else "less"
    return f", {memory(abs(difference))} {words} than estimated ({difference / estimate.total:+.0%})"


def process(hive: str, process: WorkerProcessInfo) -> Facts:
    return _told(
        [
            ("pid", str(process.pid)),
            ("kind", process.kind),
            ("name", process.name),
            ("worker", process.worker_id),
            ("hive", hive),
            ("parent", str(process.ppid)),
            ("user", process.user),
            ("memory", memory(process.memory)),
            ("devices", on_devices(process)),
            ("started", local(process.started_at)),
        ]
    )


def model(hive: str, model: ModelInfo) -> Facts:
    return _told(
        [
            ("model", model.model),
            ("hive", hive),
            ("revision", model.revision),
            ("architecture", model.architecture),
            ("context", with_unit(model.max_model_len, "tokens")),
            ("dtype", model.dtype),
            ("format", model.format),
            ("weights", size(model.size)),
            (
                "on disk",
                f"{size(model.size_on_disk)} in {count(model.files, 'file')}" if model.size_on_disk else None,
            ),
            ("last used", local(model.last_used_at)),
            ("used by", ", ".join(model.used_by)),
        ]
    )


def hive(hive: HiveInfo) -> Facts:
    disk, free = hive.disk, None
    if disk is not None:
        free = f"{size(disk.free)} of {size(disk.total)} free, models take {size(disk.models)}"
        if disk.reserved:
            free += f", {size(disk.reserved)} promised to downloads"
    return _told(
        [
            ("hive", hive.hive_id),
            ("state", hive.state),
            ("draining", "yes: it takes no new work" if hive.draining else None),
            ("url", hive.url),
            ("version", hive.version),
            ("last seen", None if hive.last_seen_s is None else f"{hive.last_seen_s:.0f} s ago"),
            ("labels", labels(hive.labels)),
            ("disk", free),
        ]
    )


def device_issues(hive: str, device: Device) -> list[str]:
    """Say what is wrong with a device."""
    return [f"{device_name(device)} of {hive} is {device.health}: {issue}" for issue in device.issues]


def device_notes(hive: str, device: Device) -> list[str]:
    """Say what a table has no room for: what of a device is kept free, who uses it, what it is a part of."""
    name = f"{device_name(device)} of {hive}"
    notes = []
    if device.memory_kept_free:
        notes.append(f"{name} keeps {memory(device.memory_kept_free)} free.")
    for process in device.processes:
        whose = f"worker {process.worker_id}" if process.worker_id else "no worker of this hive"
        taken = "an unknown amount of memory" if process.memory is None else memory(process.memory)
        notes.append(f"{name}: process {process.pid} ({whose}) uses {taken}.")
    if device.mig_uuid is not None:
        notes.append(f"{name} is a MIG slice of {device.mig_uuid}.")
    return notes


def finding(found: Finding) -> list[str]:
    """Tell one thing that was checked, and what to do about it, in lines."""
    lines = [f"{found.status:8} {found.check}: {found.message}"]
    return lines if found.remedy is None else [*lines, f"{'':8} What to do: {found.remedy}"]


def verdict(findings: Sequence[Finding]) -> str:
    """Sum up a check."""
    by_status = {status: sum(f.status == status for f in findings) for status in ("ok", "warning", "failed")}
    warnings = count(by_status["warning"], "warning")
    return f"{by_status['ok']} ok, {warnings}, {by_status['failed']} failed."
