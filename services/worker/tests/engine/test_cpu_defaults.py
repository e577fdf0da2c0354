"""What vLLM is told on a CPU, and what it is not told where the user has spoken."""

from pathlib import Path

import pytest

from rbee_worker.engine.cpu_defaults import GIB, MIB, cpu_defaults, weight_bytes


def arguments(user: list[str], environment: dict[str, str] | None = None) -> list[str]:
    return cpu_defaults(user, environment or {}, weight_bytes=100 * MIB, cores=4).arguments


def test_all_of_them_where_nothing_was_said() -> None:
    defaults = cpu_defaults([], {}, weight_bytes=100 * MIB, cores=4)

    assert defaults.arguments == [
        "--enforce-eager", "--distributed-executor-backend", "uni",
        "--kv-cache-memory-bytes", str(800 * MIB), "--max-model-len", "auto",
    ]  # fmt: skip
    assert defaults.environment == {
        "OMP_NUM_THREADS": "3",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


@pytest.mark.parametrize(
    ("user", "left_out"),
    [
        (["--no-enforce-eager"], "--enforce-eager"),
        (["-O3"], "--enforce-eager"),
        (["-cc.mode=3"], "--enforce-eager"),
        (["--compilation_config.mode", "3"], "--enforce-eager"),
        (["--tensor-parallel-size=2"], "--distributed-executor-backend"),
        (["-tp", "2"], "--distributed-executor-backend"),
        (["--kv_cache_memory_bytes", "5"], "--kv-cache-memory-bytes"),
        (["--gpu-memory-utilization", "0.5"], "--max-model-len"),
        (["--max-model-len", "64"], "--max-model-len"),
    ],
)
def test_each_gives_way_to_the_users(user: list[str], left_out: str) -> None:
    assert left_out in arguments([])
    assert left_out not in arguments(user)


def test_vllms_own_variable_gives_the_cache_too() -> None:
    assert "--kv-cache-memory-bytes" not in arguments([], {"VLLM_CPU_KVCACHE_SPACE": "4"})


def test_a_config_file_may_say_anything() -> None:
    assert arguments(["--config", "vllm.yaml"]) == []


@pytest.mark.parametrize(
    ("weights", "expected"), [(None, GIB), (1, 32 * MIB), (50 * MIB, 400 * MIB), (16 * GIB, GIB)]
)
def test_the_cache_is_bounded(weights: int | None, expected: int) -> None:
    defaults = cpu_defaults([], {}, weight_bytes=weights, cores=1)

    assert str(expected) in defaults.arguments
    assert defaults.environment["OMP_NUM_THREADS"] == "1"


def test_weighs_the_files_of_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "model-2.safetensors").write_bytes(b"x" * 5)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 100)

    assert weight_bytes(str(tmp_path)) == 15
    assert weight_bytes("org/model") is None
