"""What vLLM is told on a CPU where the user has said nothing: arguments and environment, as plain values."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

MIB = 1 << 20
GIB = 1 << 30

# vLLM's own default on a CPU is a share of the whole machine's memory (92 %), taken at once.
KV_CACHE_MIN_BYTES = 32 * MIB
KV_CACHE_MAX_BYTES = GIB
# A small model gets a small cache: as a rule of thumb eight times its weights.
KV_CACHE_PER_WEIGHT_BYTE = 8

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
_COMPILE_FLAGS = {
    "--enforce-eager", "--no-enforce-eager", "--compilation-config", "--cc", "-cc", "--optimization-level",
    "-O",
}  # fmt: skip
_EXECUTOR_FLAGS = {
    "--distributed-executor-backend", "--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp",
    "--data-parallel-size", "-dp",
}  # fmt: skip
_KV_FLAGS = {"--kv-cache-memory-bytes", "--gpu-memory-utilization", "--num-gpu-blocks-override"}


class Defaults(Struct, frozen=True, kw_only=True):
    """Arguments to put before the user's, and variables to set where the environment has none."""

    arguments: list[str]
    environment: dict[str, str]


def cpu_defaults(
    user_arguments: Sequence[str], environment: Mapping[str, str], *, weight_bytes: int | None, cores: int
) -> Defaults:
    """Choose vLLM's settings on a CPU; each gives way to the user's argument or variable.

    - `--enforce-eager`: torch.compile adds some 40 s to a start and saves little on a CPU. And
      `TORCHDYNAMO_DISABLE`, as vLLM's sampler has compiled parts all the same: the first request with
      `logprobs` took 23 s, and every other request waited for it.
    - the uni executor (and `VLLM_ENABLE_V1_MULTIPROCESSING=0`, without which vLLM makes `mp` of it): one
      process less, about 0.4 GiB and 10 s.
    - `OMP_NUM_THREADS`: one core stays free for this process; vLLM's threads spin.
    - `--kv-cache-memory-bytes`: eight times the weights, at least 32 MiB and at most 1 GiB (also where
      the weights are not known).
    - `--max-model-len auto`: the model's context, or as much of it as that cache holds.

    A `--config` file may hold any argument, so with one only the environment is set.
    """
    named = set(_names(user_arguments))
    arguments: list[str] = []
    variables = {"OMP_NUM_THREADS": str(max(1, cores - 1))}
    if "--config" in named:
        return Defaults(arguments=arguments, environment=variables)
    if not named & _COMPILE_FLAGS:
        arguments.append("--enforce-eager")
        variables["TORCHDYNAMO_DISABLE"] = "1"
    if not named & _EXECUTOR_FLAGS:
        arguments += ["--distributed-executor-backend", "uni"]
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not named & _KV_FLAGS and not environment.get("VLLM_CPU_KVCACHE_SPACE"):
        arguments += ["--kv-cache-memory-bytes", str(_kv_cache_bytes(weight_bytes))]
        if "--max-model-len" not in named:
            arguments += ["--max-model-len", "auto"]
    return Defaults(arguments=arguments, environment=variables)


def weight_bytes(model: str) -> int | None:
    """Give the size of the weights of a model folder, in bytes; None where it is not one."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    return (
        sum(f.stat().st_size for f in folder.iterdir() if f.suffix in _WEIGHT_SUFFIXES and f.is_file())
        or None
    )


def _kv_cache_bytes(weights: int | None) -> int:
    if weights is None:
        return KV_CACHE_MAX_BYTES
    return min(KV_CACHE_MAX_BYTES, max(KV_CACHE_MIN_BYTES, KV_CACHE_PER_WEIGHT_BYTE * weights))


def _names(arguments: Sequence[str]) -> Iterator[str]:
    """Give the flags' names as vLLM's parser sees them: dashes for underscores, no value, no dotted key."""
    for argument in arguments:
        if argument.startswith("--"):
            yield "--" + argument[2:].split("=", 1)[0].split(".", 1)[0].replace("_", "-")
        elif argument.startswith("-O"):
            yield "-O"
        elif argument.startswith("-"):
            yield argument.split("=", 1)[0].split(".", 1)[0]
