"""What a worker takes of its devices, and what it is told so that it takes no more."""

from pathlib import Path
from typing import Any

import pytest

from rbee_contracts.errors import InvalidRequest, NoCapacity
from rbee_contracts.nodes import MemoryEstimate
from rbee_hive.devices import allotment as module
from rbee_hive.devices.allotment import LaunchMemory, launch_memory, plan, read_arguments
from rbee_hive.devices.estimate import CPU_OVERHEAD_BYTES
from rbee_worker.engine import cpu_defaults

GIB = 1 << 30
TOTAL = 80 * GIB
SMALL = MemoryEstimate(weights=2 * GIB, kv_cache=1 * GIB, overhead=2 * GIB)
CPU = CPU_OVERHEAD_BYTES
MODEL = Path(__file__).resolve().parents[4] / "models/rbee-tiny"


def on_gpu(*args: str, available: int = TOTAL, estimate: MemoryEstimate | None = SMALL) -> LaunchMemory:
    return launch_memory(
        kind="cuda", worker_args=args, estimate=estimate, total=TOTAL, available=available, environ={}
    )


def on_cpu(
    *args: str, estimate: MemoryEstimate | None = SMALL, environ: dict[str, str] | None = None
) -> LaunchMemory:
    return launch_memory(
        kind="cpu", worker_args=args, estimate=estimate, total=TOTAL, available=TOTAL, environ=environ or {}
    )


def test_by_default_a_worker_takes_nine_tenths_and_is_told_so() -> None:
    launch = on_gpu()

    assert launch.bytes_each == 72 * GIB
    assert launch.arguments == ["--gpu-memory-utilization", "0.9000"]


def test_where_less_is_left_it_takes_what_is_left() -> None:
    launch = on_gpu(available=40 * GIB)

    assert launch.arguments == ["--gpu-memory-utilization", "0.5000"]
    assert launch.bytes_each == 40 * GIB


@pytest.mark.parametrize("available", [1, 12345678901, 33 * GIB + 7, 71 * GIB])
def test_what_is_taken_is_never_more_than_what_is_left(available: int) -> None:
    launch = on_gpu(available=available, estimate=None)

    assert launch.bytes_each <= available
    assert available - launch.bytes_each <= TOTAL // 10**4 + 1 or available > 72 * GIB


def test_the_callers_share_is_what_it_takes() -> None:
    launch = on_gpu("--gpu-memory-utilization", "0.45", available=TOTAL)

    assert launch.bytes_each == 36 * GIB
    assert launch.arguments == []


def test_two_models_fit_on_one_gpu_when_each_is_given_its_cache() -> None:
    first = on_gpu("--kv-cache-memory-bytes", "4G")
    second = on_gpu("--kv-cache-memory-bytes=4G", available=TOTAL - first.bytes_each)

    assert first.bytes_each == second.bytes_each == 8 * GIB
    # vLLM does not start where less than its share is free, even if it sizes nothing by it.
    assert first.arguments == second.arguments == ["--gpu-memory-utilization", "0.1000"]


def test_a_share_beside_a_cache_is_the_callers_own() -> None:
    launch = on_gpu("--kv-cache-memory-bytes", "4G", "--gpu-memory-utilization", "0.2")

    assert launch.arguments == []
    assert launch.bytes_each == 8 * GIB


def test_an_argument_file_may_say_anything_so_nothing_is_told() -> None:
    assert on_gpu("--config", "args.yaml") == LaunchMemory(bytes_each=72 * GIB, arguments=[], estimate=SMALL)


@pytest.mark.parametrize(
    "args",
    [(), ("--gpu-memory-utilization", "0.1")],
    ids=["what-is-left", "the-callers-share"],
)
def test_what_certainly_does_not_fit_is_refused_at_once(args: tuple[str, ...]) -> None:
    large = MemoryEstimate(weights=16 * GIB, kv_cache=GIB, overhead=0)

    with pytest.raises(NoCapacity, match=r"weights need 16\.0 GiB") as raised:
        on_gpu(*args, available=8 * GIB, estimate=large)

    assert raised.value.code == "no_device_memory"
    assert "--max-model-len" in raised.value.details


def test_a_cache_that_is_fitted_to_what_is_left_refuses_nothing() -> None:
    long = MemoryEstimate(weights=2 * GIB, kv_cache=100 * GIB, overhead=2 * GIB)

    with pytest.raises(NoCapacity, match="KV cache of one request"):
        on_gpu(estimate=long)
    assert on_gpu("--max-model-len", "auto", estimate=long).bytes_each == 72 * GIB


def test_a_quantisation_at_load_may_make_it_fit() -> None:
    large = MemoryEstimate(weights=100 * GIB, kv_cache=GIB, overhead=0)

    assert on_gpu("--quantization", "fp8", estimate=large).bytes_each == 72 * GIB


@pytest.mark.parametrize(
    ("args", "environ", "expected"),
    [
        ((), {}, 2 * GIB + GIB + CPU),
        (("--kv-cache-memory-bytes", "64M"), {}, 2 * GIB + (64 << 20) + CPU),
        (("--kv-cache-memory-bytes", "64M"), {"VLLM_CPU_KVCACHE_SPACE": "6"}, 8 * GIB + CPU),
        (("--gpu-memory-utilization", "0.5"), {}, 40 * GIB),
        ((), {"VLLM_CPU_KVCACHE_SPACE": ""}, 3 * GIB + CPU),
    ],
    ids=["by-default", "bytes", "variable-wins", "share", "empty-variable"],
)
def test_on_a_cpu(args: tuple[str, ...], environ: dict[str, str], expected: int) -> None:
    launch = on_cpu(*args, environ=environ)

    assert launch.bytes_each == expected
    assert launch.arguments == []


def test_on_a_cpu_without_an_estimate() -> None:
    assert on_cpu(estimate=None).bytes_each == GIB + CPU_OVERHEAD_BYTES


def test_the_cache_on_a_cpu_is_what_the_worker_makes_of_it() -> None:
    assert module.CPU_KV_CACHE_MIN_BYTES == cpu_defaults.KV_CACHE_MIN_BYTES
    assert module.CPU_KV_CACHE_MAX_BYTES == cpu_defaults.KV_CACHE_MAX_BYTES
    assert module.CPU_KV_CACHE_PER_WEIGHT_BYTE == cpu_defaults.KV_CACHE_PER_WEIGHT_BYTE


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], {}),
        (["--max-model-len", "8K", "--dtype=half"], {"max_model_len": 8192, "dtype": "half"}),
        (["--max_model_len=4096"], {"max_model_len": 4096}),
        (["--max-model-len", "-1"], {"fits_length": True}),
        (["-tp", "2", "--kv-cache-dtype", "fp8"], {"tensor_parallel": 2, "kv_cache_dtype": "fp8"}),
        (["--gpu-memory-utilization", "0.1", "--gpu-memory-utilization=.5"], {"share": 0.5}),
        (["--enforce-eager", "--config", "a.yaml"], {"has_file": True}),
        (["-pp", "2", "-q", "fp8"], {"pipeline_parallel": 2, "is_need_known": False}),
        (["-tp", "0", "-pp=many"], {}),
    ],
    ids=[
        "nothing",
        "spaced-and-equals",
        "underscores",
        "auto",
        "short",
        "last-one-counts",
        "file",
        "pipeline",
        "no-count",
    ],
)
def test_arguments_are_read_as_vllm_reads_them(args: list[str], expected: dict[str, Any]) -> None:
    assert read_arguments(args) == module.EngineArguments(**expected)


@pytest.mark.parametrize(
    "args",
    [
        ["--gpu-memory-utilization", "much"],
        ["--gpu-memory-utilization", "1.5"],
        ["--gpu-memory-utilization=0"],
        ["--gpu-memory-utilization", "nan"],
        ["--kv-cache-memory-bytes", "lots"],
        ["--kv-cache-memory-bytes"],
    ],
    ids=["no-number", "above-one", "nothing", "nan", "no-bytes", "no-value"],
)
def test_arguments_that_cannot_be_read(args: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="is not a"):
        read_arguments(args)


def test_a_plan_reads_the_model() -> None:
    launch = plan(
        MODEL,
        kind="cuda",
        device_count=2,
        worker_args=["--max-model-len", "1024"],
        total=TOTAL,
        available=TOTAL,
        environ={},
    )

    assert launch.estimate is not None
    assert launch.estimate.kv_cache == 4 * 1024 * 1 * 32 * 2 * 2


def test_stages_of_a_pipeline_share_the_layers() -> None:
    def weights(devices: int, *args: str) -> int:
        launch = plan(
            MODEL,
            kind="cuda",
            device_count=devices,
            worker_args=args,
            total=TOTAL,
            available=TOTAL,
            environ={},
        )
        assert launch.estimate is not None
        return launch.estimate.weights

    assert weights(4) == weights(4, "-pp", "2") == weights(4, "-tp", "2", "-pp", "2") < weights(1) // 3


@pytest.mark.parametrize(
    ("kind", "expected"), [("cpu", 40 + (32 << 20) + CPU_OVERHEAD_BYTES), ("cuda", 72 * GIB)]
)
def test_a_plan_for_a_model_that_does_not_tell_knows_its_weights(
    kind: Any, expected: int, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(bytes(40))

    launch = plan(
        tmp_path / "model.gguf",
        kind=kind,
        device_count=1,
        worker_args=[],
        total=TOTAL,
        available=TOTAL,
        environ={},
    )

    assert launch.estimate is None
    assert launch.bytes_each == expected


def test_weights_that_are_known_are_refused_without_an_estimate(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(bytes(1000))

    with pytest.raises(NoCapacity, match=r"weights need 1000 B, and it would get"):
        plan(tmp_path, kind="cuda", device_count=1, worker_args=[], total=1000, available=1000, environ={})
