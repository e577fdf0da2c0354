"""What a model needs, told by its config.json and headers."""

import json
from pathlib import Path
from typing import Any

import pytest

from rbee_hive.devices.estimate import (
    CPU_OVERHEAD_BYTES,
    FALLBACK_TOKENS,
    GPU_OVERHEAD_BYTES,
    EstimateUnknown,
    estimate,
)
from rbee_hive.devices.kv_cache import TOKENS_IN_FLIGHT, kv_cache_bytes, model_float_bits, parse_tokens

MODELS = Path(__file__).resolve().parents[4] / "models"

LLAMA_8B = {
    "model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_size": 4096, "torch_dtype": "bfloat16", "max_position_embeddings": 131072,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "num_attention_heads": 128, "hidden_size": 7168,
    "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA_3 = {
    "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "hidden_size": 2560, "sliding_window": 1024, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
}  # fmt: skip
GPT_OSS = {
    "num_hidden_layers": 4, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "hidden_size": 2880, "sliding_window": 128, "dtype": "bfloat16",
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
LONG = 1 << 17
SLIDING_1024 = -(-(1023 + TOKENS_IN_FLIGHT) // 16) * 16


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        (LLAMA_8B, {"tokens": 8192}, 1 << 30),  # 128 KiB a token, as is known of it
        (LLAMA_8B, {"tokens": 8192, "tensor_parallel": 4}, 1 << 28),
        (LLAMA_8B, {"tokens": 8192, "tensor_parallel": 16}, 1 << 27),
        (LLAMA_8B, {"tokens": 8192, "kv_cache_dtype": "fp8_e4m3"}, 1 << 29),
        (LLAMA_8B, {"tokens": 8192, "kv_cache_dtype": "auto", "dtype": "float32"}, 1 << 31),
        (LLAMA_8B, {"tokens": 1}, 16 * 131072),
        ({"text_config": LLAMA_8B, "vision_config": {"num_hidden_layers": 9}}, {"tokens": 8192}, 1 << 30),
        ({"thinker_config": {"text_config": LLAMA_8B}}, {"tokens": 8192}, 1 << 30),
        (DEEPSEEK_V3, {"tokens": 1024}, 61 * 1024 * 576 * 2),
        (DEEPSEEK_V3, {"tokens": 1024, "tensor_parallel": 8}, 61 * 1024 * 576 * 2),
        (GEMMA_3, {"tokens": LONG}, (2 * LONG + 10 * SLIDING_1024) * 4 * 256 * 2 * 2),
        (GEMMA_3, {"tokens": 512}, 12 * 512 * 4 * 256 * 2 * 2),
        (GPT_OSS, {"tokens": LONG}, (2 * LONG + 2 * 2176) * 8 * 64 * 2 * 2),
        (LLAMA_8B | {"sliding_window": 4096}, {"tokens": LONG}, 6144 * 131072),
        (LLAMA_8B | {"sliding_window": 4096, "use_sliding_window": False}, {"tokens": LONG}, 1 << 34),
        (
            LLAMA_8B | {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
            {"tokens": 8192},
            1 << 28,
        ),
        (LLAMA_8B | {"layers_block_type": ["mamba", "attention"]}, {"tokens": 8192}, 1 << 29),
        (LLAMA_8B | {"hybrid_override_pattern": "M-M*-M*-"}, {"tokens": 8192}, 1 << 26),
        (
            LLAMA_8B | {"layer_types": ["chunked_attention"], "attention_chunk_size": 8192},
            {"tokens": LONG},
            10240 * 131072,
        ),
        (LLAMA_8B | {"num_key_value_heads": [4] * 16 + [12] * 16}, {"tokens": 8192}, 1 << 30),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, {"tokens": 1024}, 12 * 1024 * 768 * 2 * 2),
        (
            {"n_layer": 2, "n_head": 8, "n_embd": 512, "multi_query": True},
            {"tokens": 16},
            2 * 16 * 64 * 2 * 2,
        ),
        ({"model_type": "bert", "num_hidden_layers": 12}, {"tokens": 512}, 0),
        (
            LLAMA_8B | {"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}},
            {"tokens": 8192},
            1 << 29,
        ),
        (LLAMA_8B | {"quantization_config": {"kv_cache_quant_algo": "FP8"}}, {"tokens": 8192}, 1 << 29),
        (LLAMA_8B | {"quantization_config": {"quant_method": "awq"}}, {"tokens": 8192}, 1 << 30),
        (LLAMA_8B, {"tokens": 8192, "kv_cache_dtype": "unheard_of"}, 1 << 30),
        (
            {"num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8, "hidden_size": 16,
             "linear_num_value_heads": 2, "full_attention_interval": 4},
            {"tokens": 16},
            16 * 2 * 8 * 2 * 2,
        ),
    ],
    ids=[
        "grouped-heads", "4-devices", "more-devices-than-heads", "fp8", "float32", "one-block",
        "inside-text-config", "inside-thinker", "latent", "latent-on-8", "every-6th-is-full",
        "shorter-than-window", "layer-types", "all-sliding", "sliding-turned-off", "linear-attention",
        "mamba", "pattern", "chunked", "heads-by-layer", "gpt2-names", "multi-query", "encoder",
        "own-fp8", "own-fp8-modelopt", "other-quantisation", "unknown-type", "every-4th-has-a-cache",
    ],
)  # fmt: skip
def test_the_cache_of_one_request(config: dict[str, Any], arguments: dict[str, Any], expected: int) -> None:
    assert kv_cache_bytes(config, **arguments) == expected


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": -1, "num_attention_heads": 2, "hidden_size": 8},
        {"num_hidden_layers": 10**12, "num_attention_heads": 2, "hidden_size": 8},
        {"num_hidden_layers": "two", "num_attention_heads": True, "hidden_size": 8},
        {"num_hidden_layers": 2, "head_dim": 8},
    ],
    ids=["empty", "no-heads", "negative", "huge", "wrong-types", "no-kv-heads"],
)
def test_a_configuration_that_does_not_tell(config: dict[str, Any]) -> None:
    assert kv_cache_bytes(config, tokens=16) is None


@pytest.mark.parametrize(
    ("config", "dtype", "bits"),
    [
        ({}, None, 16),
        ({"torch_dtype": "float32"}, None, 16),
        ({"torch_dtype": "float32"}, "float32", 32),
        ({"dtype": "torch.float16"}, "auto", 16),
        ({"torch_dtype": "bfloat16"}, "float", 32),
    ],
    ids=["nothing", "32-becomes-16", "asked-for-32", "auto", "short-name"],
)
def test_the_type_the_engine_runs_with(config: dict[str, Any], dtype: str | None, bits: int) -> None:
    assert model_float_bits(config, dtype) == bits


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("25.6k", 25_600), ("auto", None), ("-1", None)],
)
def test_tokens_are_read_as_vllm_reads_them(text: str, tokens: int | None) -> None:
    assert parse_tokens(text) == tokens


def test_a_real_model_on_a_cpu_and_on_two_gpus() -> None:
    on_cpu = estimate(MODELS / "rbee-tiny", kind="cpu")
    on_gpus = estimate(MODELS / "rbee-tiny", max_model_len=1024, tensor_parallel=2)

    assert on_cpu.kv_cache == 4 * 2048 * 2 * 32 * 2 * 2
    assert on_cpu.overhead == CPU_OVERHEAD_BYTES
    assert on_cpu.total == on_cpu.weights + on_cpu.kv_cache + on_cpu.overhead
    assert on_gpus.kv_cache == on_cpu.kv_cache // 4
    assert on_gpus.weights == -(-on_cpu.weights // 2)
    assert on_gpus.overhead == GPU_OVERHEAD_BYTES


def test_without_a_length_in_the_configuration_some_is_reckoned_with(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(10))

    assert estimate(tmp_path).kv_cache == FALLBACK_TOKENS * 8 * 2 * 2


@pytest.mark.parametrize(
    "config",
    [None, "[]", "{}", '{"model_type": "odd"}', "{", "[" * 100_000],
    ids=["none", "no-object", "empty", "odd", "broken", "deep"],
)
def test_what_cannot_be_told_is_said(tmp_path: Path, config: str | None) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(10))
    if config is not None:
        (tmp_path / "config.json").write_text(config)

    with pytest.raises(EstimateUnknown, match=r"config\.json"):
        estimate(tmp_path)
