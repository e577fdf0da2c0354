"""What a model will need of its devices' memory, told before it is spawned."""

from pathlib import Path
from typing import Literal

from rbee_contracts.errors import RbeeError
from rbee_contracts.nodes import MemoryEstimate
from rbee_hive.devices.kv_cache import kv_cache_bytes, model_float_bits, model_length
from rbee_hive.devices.weights import read_json, weight_bytes

MIB = 1 << 20
GIB = 1 << 30

CPU_OVERHEAD_BYTES = 5 * GIB // 4
"""A worker on a CPU besides weights and KV cache. Measured with vLLM 0.32 and a model of 2 MB with 32 MiB of
cache: 1.06 GiB resident over its processes, rounded up (docs/measurements.md)."""

GPU_OVERHEAD_BYTES = 2 * GIB
"""A worker on a GPU besides weights and KV cache: CUDA context, libraries' workspaces, the activations of
one step, CUDA graphs. Taken from what vLLM documents of them, not measured here: with it an estimate says
whether a model may fit, and `memory_used` of a worker says what it really took."""

FALLBACK_TOKENS = 4096
"""The context that is reckoned with where neither the caller nor the model tells one."""


class EstimateUnknown(RbeeError):
    """The model's configuration does not tell what it needs; it may run all the same.

    Args:
        weights: what is known nevertheless, in bytes over all devices together.
    """

    title = "Memory need unknown"
    default_code = "estimate_unknown"

    def __init__(self, details: str, *, weights: int) -> None:
        super().__init__(details)
        self.weights = weights


def estimate(
    model: Path,
    *,
    max_model_len: int | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    dtype: str | None = None,
    kv_cache_dtype: str | None = None,
    kind: Literal["cuda", "cpu"] = "cuda",
) -> MemoryEstimate:
    """Give the bytes that `model` needs on each of its devices; reads headers and config.json only.

    Weights are split evenly over the devices. The KV cache is that of one request of `max_model_len`
    tokens, which is the least that vLLM starts with.

    Args:
        model: the model's directory, or a GGUF file.
        max_model_len: in tokens; None is the model's own.
        pipeline_parallel: stages, each of which has its part of the layers.
        dtype: as in `--dtype`.
        kv_cache_dtype: as in `--kv-cache-dtype`.

    Raises:
        ModelUnreadable: the weights are damaged or not there (`model_unreadable`).
        EstimateUnknown: config.json is not there, or does not give layers and heads.
    """
    folder = model if model.is_dir() else model.parent
    config = read_json(folder / "config.json")
    bits = model_float_bits(config or {}, dtype)
    weights = weight_bytes(model, float_bytes=bits // 8)
    if config is None:
        raise EstimateUnknown(
            f"The memory that the model needs cannot be told: {folder.name}/config.json is not there, or is "
            "no JSON object.",
            weights=weights,
        )
    tokens = max_model_len or model_length(config) or FALLBACK_TOKENS
    cache = kv_cache_bytes(
        config,
        tokens=tokens,
        tensor_parallel=tensor_parallel,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
    )
    if cache is None:
        raise EstimateUnknown(
            f"The KV cache that the model needs cannot be told: {folder.name}/config.json does not give its "
            "layers and heads. Set it yourself with --kv-cache-memory-bytes in worker_args.",
            weights=weights,
        )
    return MemoryEstimate(
        weights=-(-weights // (tensor_parallel * pipeline_parallel)),
        kv_cache=-(-cache // pipeline_parallel),
        overhead=CPU_OVERHEAD_BYTES if kind == "cpu" else GPU_OVERHEAD_BYTES,
    )
