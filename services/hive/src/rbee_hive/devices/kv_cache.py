"""How much KV cache a model needs for one request, told by its config.json. Pure."""

import re
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

BLOCK_TOKENS = 16
"""vLLM's cache grows by blocks of so many tokens."""

TOKENS_IN_FLIGHT = 2048
"""Tokens of one step, which a sliding window holds besides itself: vLLM's least default, 8192 on a large GPU.
A need that is told too small costs an engine's own refusal; one too large would refuse what fits."""

FLOAT_BITS = {
    "float64": 64, "double": 64, "float32": 32, "float": 32, "float16": 16, "half": 16, "bfloat16": 16,
}  # fmt: skip

CACHE_BITS = FLOAT_BITS | {"int8": 8, "nvfp4": 4, "int4": 4}
"""Besides all whose name begins with fp8, which have 8."""

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LENGTH = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
_WITHOUT_CACHE = frozenset(
    {"bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "nomic_bert", "deberta-v2", "vit", "clip"}
)
"""Model types that read everything at once and keep nothing."""

_STATELESS_LAYERS = ("linear", "mamba", "ssm", "recurrent", "conv", "mlp", "moe")
"""Kinds of layers that keep no keys and values; what they keep does not grow with the request."""

_UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip

_human = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)\Z").match


class _Shape(Struct, frozen=True):
    """What the cache of one layer depends on. `window` None: it keeps all tokens."""

    heads: int
    head_dim: int
    window: int | None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the part of a model's configuration that tells about its language model."""
    for name in _NESTED:
        nested = config.get(name)
        if isinstance(nested, Mapping):
            return text_config(nested)
    return config


def model_length(config: Mapping[str, Any]) -> int | None:
    """Give the longest context the model was made for, in tokens; None where it does not tell."""
    return _number(text_config(config), _LENGTH)


def model_float_bits(config: Mapping[str, Any], dtype: str | None = None) -> int:
    """Give the bits of a number in the type that the engine runs the model with.

    `dtype` as in `--dtype`; with None or `auto` it is the model's own, and 16 for one of 32.
    """
    if dtype is not None and dtype in FLOAT_BITS:
        return FLOAT_BITS[dtype]
    for part in (text_config(config), config):
        own = part.get("dtype") or part.get("torch_dtype")
        if isinstance(own, str):
            return min(16, FLOAT_BITS.get(own.removeprefix("torch."), 16))
    return 16


def kv_cache_bytes(
    config: Mapping[str, Any],
    *,
    tokens: int,
    tensor_parallel: int = 1,
    dtype: str | None = None,
    kv_cache_dtype: str | None = None,
) -> int | None:
    """Give the bytes of KV cache on each device that one request of `tokens` tokens needs.

    Counts attention with keys and values (grouped heads, at least one on each device), multi-head latent
    attention (one latent vector for all heads, whole on each device), and layers with a sliding window or
    chunks, which keep no more than that and one step. Layers without keys and values (Mamba, linear
    attention) are not counted: what they keep does not grow.

    Returns:
        None where the configuration does not tell.
    """
    text = text_config(config)
    if text.get("model_type") in _WITHOUT_CACHE:
        return 0
    layers = _number(text, _LAYERS)
    if layers is None or not 0 < layers <= 10_000:
        return None
    bits = _cache_bits(config, dtype, kv_cache_dtype)
    latent = _number(text, ("kv_lora_rank",))
    if latent is not None:
        width = latent + (_number(text, ("qk_rope_head_dim",)) or 0)
        return layers * _padded(tokens, None) * width * bits // 8
    shapes = _shapes(text, layers)
    if shapes is None:
        return None
    values = sum(
        _padded(tokens, shape.window) * max(1, -(-shape.heads // tensor_parallel)) * shape.head_dim
        for shape in shapes
    )
    return 2 * values * bits // 8


def parse_tokens(text: str) -> int | None:
    """Read a number of tokens as vLLM does: 4096, 32k (32,000), 32K (32,768); None for `auto` and -1."""
    match = _human(text.strip())
    if match is None:
        return None
    number, unit = match.groups()
    return int(float(number) * _UNITS[unit])


def _shapes(text: Mapping[str, Any], layers: int) -> list[_Shape] | None:
    heads = _number(text, _HEADS)
    hidden = _number(text, _HIDDEN)
    head_dim = _number(text, ("head_dim", "attention_head_dim"))
    if head_dim is None:
        if not heads or hidden is None:
            return None
        head_dim = hidden // heads
    by_layer = next((text[name] for name in _KV_HEADS if isinstance(text.get(name), list)), None)
    if text.get("multi_query") is True:
        kv_heads: int | None = 1
    else:
        kv_heads = _number(text, _KV_HEADS) or heads
    windows = _windows(text, layers)
    if kv_heads is None:
        return None
    return [
        _Shape(_at(by_layer, layer, kv_heads), head_dim, window)
        for layer, window in enumerate(windows)
        if window != 0
    ]


def _windows(text: Mapping[str, Any], layers: int) -> list[int | None]:
    """Give each layer's window in tokens: None keeps all, 0 keeps nothing."""
    window = _number(text, ("sliding_window",))
    if text.get("use_sliding_window") is False:
        window = None
    chunk = _number(text, ("attention_chunk_size",))
    kinds = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(kinds, list) and kinds:
        return [_window_of(str(kinds[layer % len(kinds)]), window, chunk) for layer in range(layers)]
    pattern = text.get("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:
        return [None if kind == "*" else 0 for kind in pattern]
    every = _number(text, ("sliding_window_pattern", "full_attention_interval"))
    if every and window is not None:
        return [None if (layer + 1) % every == 0 else window for layer in range(layers)]
    if every and "linear_num_value_heads" in text:
        return [None if (layer + 1) % every == 0 else 0 for layer in range(layers)]
    return [window] * layers


def _window_of(kind: str, window: int | None, chunk: int | None) -> int | None:
    if "sliding" in kind:
        return window
    if "chunked" in kind:
        return chunk
    if any(word in kind for word in _STATELESS_LAYERS):
        return 0
    return None


def _padded(tokens: int, window: int | None) -> int:
    held = tokens if window is None else min(tokens, window - 1 + TOKENS_IN_FLIGHT)
    return -(-held // BLOCK_TOKENS) * BLOCK_TOKENS


def _cache_bits(config: Mapping[str, Any], dtype: str | None, kv_cache_dtype: str | None) -> int:
    if kv_cache_dtype is None or kv_cache_dtype == "auto":
        return _quantised_cache_bits(config) or model_float_bits(config, dtype)
    if kv_cache_dtype.startswith("fp8"):
        return 8
    return CACHE_BITS.get(kv_cache_dtype, 16)


def _quantised_cache_bits(config: Mapping[str, Any]) -> int | None:
    """Give the bits that a quantised model asks for itself; None where it asks for none."""
    quantisation = config.get("quantization_config")
    if not isinstance(quantisation, Mapping):
        return None
    scheme = quantisation.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        return _number(scheme, ("num_bits",))
    algorithm = quantisation.get("kv_cache_quant_algo")
    return 8 if isinstance(algorithm, str) and algorithm.upper() == "FP8" else None


def _number(text: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = text.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _at(by_layer: list[Any] | None, layer: int, default: int) -> int:
    if by_layer is None or layer >= len(by_layer):
        return default
    value = by_layer[layer]
    return value if isinstance(value, int) and value > 0 else default
