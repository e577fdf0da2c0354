"""What a worker will take of its devices' memory, and what it must be told so that it takes no more. Pure.

vLLM on a GPU does not take what it needs: it takes a share of the whole device (`--gpu-memory-utilization`,
0.9 by default, 0.92 in newer versions), fills what weights and activations leave of it with KV cache, and
refuses to start when less than that share is free. So two workers fit on one GPU only when each is told its
share. The hive always tells it, and reserves exactly that much:

- `--gpu-memory-utilization U` from the caller: the worker takes U of the device.
- `--kv-cache-memory-bytes N` from the caller: it takes weights, N and overhead. vLLM does not size anything
  by the share then, but still asks whether it is free, so the share that corresponds is passed as well.
- neither: it takes 0.9 of the device, or what is left where that is less and the model fits.

On a CPU vLLM's share would be one of the whole machine. The worker bounds the cache instead: by
`--kv-cache-memory-bytes` or `VLLM_CPU_KVCACHE_SPACE` (in GiB), else eight times the weights, from 32 MiB to
1 GiB (`rbee_worker.engine.cpu_defaults`).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct

from rbee_contracts.errors import InvalidRequest, NoCapacity
from rbee_contracts.nodes import MemoryEstimate
from rbee_hive.devices.estimate import CPU_OVERHEAD_BYTES, GIB, GPU_OVERHEAD_BYTES, MIB, EstimateUnknown
from rbee_hive.devices.estimate import estimate as estimate_model
from rbee_hive.devices.kv_cache import parse_tokens
from rbee_hive.devices.sizes import show_bytes

NO_DEVICE_MEMORY = "no_device_memory"

GPU_SHARE = 0.9
"""The share of a GPU that a worker takes when nobody says another."""

SHARE_DIGITS = 4
"""Shares are cut to so many digits: a ten-thousandth of 141 GB is 14 MB."""

CPU_KV_CACHE_MIN_BYTES = 32 * MIB
CPU_KV_CACHE_MAX_BYTES = GIB
CPU_KV_CACHE_PER_WEIGHT_BYTE = 8

CHANGES_THE_NEED = frozenset(
    {"--quantization", "-q", "--cpu-offload-gb", "--hf-overrides", "--load-format", "--kv-offloading-size"}
)
"""With one of these a model may need less than its files say, so that nothing is refused for its size."""

SIM_WORKER_BYTES = 128 * MIB
"""A worker with the `sim` engine: a Python process, on the CPU's memory whatever device it plays."""


class EngineArguments(Struct, frozen=True, kw_only=True):
    """What of a worker's arguments decides on memory; None where the caller has not said it."""

    share: float | None = None
    kv_cache_bytes: int | None = None
    max_model_len: int | None = None
    fits_length: bool = False
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int = 1
    data_parallel: int = 1
    has_file: bool = False
    is_need_known: bool = True


class LaunchMemory(Struct, frozen=True, kw_only=True):
    """What a worker takes and must be told.

    Args:
        bytes_each: to reserve on each of its devices.
        arguments: for the engine, to stand before the caller's own.
        estimate: what the model needs; None where that cannot be told.
    """

    bytes_each: int
    arguments: list[str]
    estimate: MemoryEstimate | None


def read_arguments(worker_args: Sequence[str]) -> EngineArguments:
    """Read what of the caller's arguments decides on memory; the last one counts, as in vLLM.

    Raises:
        InvalidRequest: a share that is none, or bytes that are no number.
    """
    given = dict(_pairs(worker_args))
    share = given.get("--gpu-memory-utilization")
    cache = given.get("--kv-cache-memory-bytes")
    length = given.get("--max-model-len")
    return EngineArguments(
        share=None if share is None else _share(share),
        kv_cache_bytes=None if cache is None else _bytes(cache),
        max_model_len=None if length is None else parse_tokens(length),
        fits_length=length is not None and length.strip().lower() in {"auto", "-1"},
        dtype=given.get("--dtype"),
        kv_cache_dtype=given.get("--kv-cache-dtype"),
        tensor_parallel=_count(given.get("--tensor-parallel-size", given.get("-tp"))),
        pipeline_parallel=_count(given.get("--pipeline-parallel-size", given.get("-pp"))) or 1,
        data_parallel=_count(given.get("--data-parallel-size", given.get("-dp"))) or 1,
        has_file="--config" in given,
        is_need_known=not given.keys() & CHANGES_THE_NEED,
    )


def tensor_parallel(worker_args: Sequence[str], device_count: int) -> int | None:
    """Give the tensor-parallel size that uses all devices; None where the caller says one.

    Raises:
        InvalidRequest: as `read_arguments`.
    """
    arguments = read_arguments(worker_args)
    return None if arguments.tensor_parallel is not None else _tensor_parallel(arguments, device_count)


def _tensor_parallel(arguments: EngineArguments, device_count: int) -> int:
    return max(1, device_count // (arguments.pipeline_parallel * arguments.data_parallel))


def launch_memory(
    *,
    kind: Literal["cuda", "cpu"],
    worker_args: Sequence[str],
    estimate: MemoryEstimate | None,
    total: int,
    available: int,
    environ: Mapping[str, str],
    weights: int | None = None,
) -> LaunchMemory:
    """Decide what a worker takes of each of its devices; the module's docstring says by which rules.

    What is certain is refused here and not half a minute later by the engine: weights, or weights and the
    cache of one request, that do not fit into what the worker would get. The overhead is not certain, so
    it refuses nothing.

    Args:
        estimate: of `plan`; None where the model does not tell what it needs.
        total: bytes of the smallest of its devices.
        available: bytes that can be reserved now on the fullest of its devices.
        environ: what the worker inherits.
        weights: bytes on each device, where they are known without an estimate.

    Raises:
        InvalidRequest: an argument of the caller's that decides on memory cannot be read.
        NoCapacity: the model does not fit (`no_device_memory`).
    """
    arguments = read_arguments(worker_args)
    if estimate is not None:
        weights = estimate.weights
    if kind == "cpu":
        return LaunchMemory(
            bytes_each=_cpu_bytes(arguments, weights, total, environ), arguments=[], estimate=estimate
        )
    if arguments.has_file and arguments.share is None and arguments.kv_cache_bytes is None:
        # The file may say anything, and ours would win over it.
        return LaunchMemory(bytes_each=_part(total, GPU_SHARE), arguments=[], estimate=estimate)
    if arguments.share is not None and arguments.kv_cache_bytes is None:
        taken = _part(total, arguments.share)
        _refuse_what_cannot_fit(arguments, weights, estimate, taken, total)
        return LaunchMemory(bytes_each=taken, arguments=[], estimate=estimate)
    if arguments.kv_cache_bytes is not None:
        taken = (weights or 0) + arguments.kv_cache_bytes + GPU_OVERHEAD_BYTES
        told = [] if arguments.share is not None else _tell(_ceiled_share(taken, total))
        return LaunchMemory(bytes_each=taken, arguments=told, estimate=estimate)
    share = min(GPU_SHARE, _floored_share(available, total))
    taken = _part(total, share)
    _refuse_what_cannot_fit(arguments, weights, estimate, taken, total)
    return LaunchMemory(bytes_each=taken, arguments=_tell(share), estimate=estimate)


def plan(
    model: Path,
    *,
    kind: Literal["cuda", "cpu"],
    device_count: int,
    worker_args: Sequence[str],
    total: int,
    available: int,
    environ: Mapping[str, str],
) -> LaunchMemory:
    """Estimate what `model` needs, and decide what its worker takes. Reads the model's headers.

    Raises:
        ModelUnreadable: its weights are damaged (`model_unreadable`).
        InvalidRequest: an argument of the caller's that decides on memory cannot be read.
        NoCapacity: the model does not fit (`no_device_memory`).
    """
    arguments = read_arguments(worker_args)
    tensor_size = arguments.tensor_parallel or _tensor_parallel(arguments, device_count)
    needed: MemoryEstimate | None = None
    weights: int | None = None
    try:
        needed = estimate_model(
            model,
            max_model_len=arguments.max_model_len,
            tensor_parallel=tensor_size,
            pipeline_parallel=arguments.pipeline_parallel,
            dtype=arguments.dtype,
            kv_cache_dtype=arguments.kv_cache_dtype,
            kind=kind,
        )
    except EstimateUnknown as exc:
        weights = -(-exc.weights // (tensor_size * arguments.pipeline_parallel))
    return launch_memory(
        kind=kind,
        worker_args=worker_args,
        estimate=needed,
        total=total,
        available=available,
        environ=environ,
        weights=weights,
    )


def _cpu_bytes(
    arguments: EngineArguments, weights: int | None, total: int, environ: Mapping[str, str]
) -> int:
    space = environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if space.isdecimal() and int(space) > 0:  # wins over the flag
        cache = int(space) * GIB
    elif arguments.kv_cache_bytes is not None:
        cache = arguments.kv_cache_bytes
    elif arguments.share is not None:
        return _part(total, arguments.share)
    elif weights is None:
        cache = CPU_KV_CACHE_MAX_BYTES
    else:
        wanted = max(CPU_KV_CACHE_MIN_BYTES, CPU_KV_CACHE_PER_WEIGHT_BYTE * weights)
        cache = min(CPU_KV_CACHE_MAX_BYTES, wanted)
    return (weights or 0) + cache + CPU_OVERHEAD_BYTES


def _refuse_what_cannot_fit(
    arguments: EngineArguments, weights: int | None, estimate: MemoryEstimate | None, taken: int, total: int
) -> None:
    if weights is None or not arguments.is_need_known:
        return
    cache = 0 if estimate is None or arguments.fits_length else estimate.kv_cache
    if weights + cache <= taken:
        return
    what = f"its weights need {show_bytes(weights)}"
    if cache:
        what += f", the KV cache of one request {show_bytes(cache)}"
    raise NoCapacity(
        f"The model does not fit: on each device {what}, and it would get {show_bytes(taken)} of "
        f"{show_bytes(total)}. Stop a worker there, give it a smaller --max-model-len or more devices in "
        "worker_args, or a larger --gpu-memory-utilization.",
        code=NO_DEVICE_MEMORY,
        title="No device memory",
    )


def _tell(share: float) -> list[str]:
    return ["--gpu-memory-utilization", f"{share:.{SHARE_DIGITS}f}"]


def _part(total: int, share: float) -> int:
    """As vLLM reckons it: rounded up."""
    return -int(-(total * share) // 1)


def _floored_share(part: int, total: int) -> float:
    unit = 10**SHARE_DIGITS
    return max(0, part) * unit // total / unit if total else 0.0


def _ceiled_share(part: int, total: int) -> float:
    unit = 10**SHARE_DIGITS
    return min(1.0, -(-part * unit // total) / unit) if total else 1.0


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and int(text) > 0 else None


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InvalidRequest(f"--gpu-memory-utilization {text[:40]!r} is not a share between 0 and 1.")
    return share


def _bytes(text: str) -> int:
    size = parse_tokens(text)
    if not size:
        raise InvalidRequest(f"--kv-cache-memory-bytes {text[:40]!r} is not a number of bytes, e.g. 4G.")
    return size


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Give each flag with its value ("" for none), names as vLLM's parser sees them."""
    for place, argument in enumerate(arguments):
        if not argument.startswith("-") or _is_number(argument):
            continue
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("_", "-")
        if not equals:
            after = arguments[place + 1] if place + 1 < len(arguments) else ""
            value = after if not after.startswith("-") or _is_number(after) else ""
        yield name, value


def _is_number(text: str) -> bool:
    return text.lstrip("-").replace(".", "", 1).isdecimal()
