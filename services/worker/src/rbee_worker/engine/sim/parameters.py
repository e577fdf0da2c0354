"""What a simulated GPU engine is like: its parameters, their defaults and their command-line flags.

The defaults are an 8B model in bf16 on one H100 SXM, by arithmetic from published figures and not by
measurement. Llama-3.1-8B: 16 GB of weights; 32 layers x 8 KV heads x 128 x 2 (K, V) x 2 bytes = 128 KiB of
KV cache per token. The card: 80 GB, 3.35 TB/s, 989 dense bf16 TFLOP/s (NVIDIA's data sheet).
"""

import argparse
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

_Positive = Annotated[float, Meta(gt=0)]
_NotNegative = Annotated[float, Meta(ge=0)]
_Count = Annotated[int, Meta(ge=1)]


class SimParameters(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of a `SimEngine`; each is also a flag, `--sim-` and its name with dashes.

    A step lasts `step_ms + step_ms_per_seq * sequences that get a token + prefilled tokens /
    prefill_tokens_per_s`. Fault injection counts all generated tokens of the engine's life.
    """

    step_ms: _Positive = 6.0
    step_ms_per_seq: _NotNegative = 0.04
    prefill_tokens_per_s: _Positive = 25_000.0
    max_num_seqs: _Count = 256
    max_num_batched_tokens: _Count = 8192
    max_model_len: Annotated[int, Meta(ge=2)] = 32_768
    block_tokens: _Count = 16
    kv_blocks: _Count = 26_000
    prefix_caching: bool = True
    eos_after_tokens: _Count = 256
    start_s: _NotNegative = 0.0
    fail_start: bool = False
    crash_after_tokens: _Count | None = None
    stall_after_tokens: _Count | None = None
    sleep_mode: bool = False
    ignore_sigterm: bool = False

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("`max_num_batched_tokens` must be at least `max_num_seqs`")
        if self.kv_blocks * self.block_tokens < self.max_model_len:
            raise ValueError(
                f"{self.kv_blocks} KV blocks of {self.block_tokens} tokens do not hold one sequence of "
                f"`max_model_len` = {self.max_model_len}"
            )


_HELP = {
    "step_ms": "milliseconds of any step: reading the weights (16 GB at 3.35 TB/s is 4.8 ms)",
    "step_ms_per_seq": "milliseconds each decoding sequence adds: reading its KV (1,000 tokens x 128 KiB)",
    "prefill_tokens_per_s": "prompt tokens computed per second (16 GFLOP a token, at 40 %% of the peak)",
    "max_num_seqs": "sequences in one step at most (vLLM's --max-num-seqs)",
    "max_num_batched_tokens": "tokens in one step at most, so longer prompts are prefilled in chunks",
    "max_model_len": "context, in tokens, prompt and output together",
    "block_tokens": "tokens in one block of the KV cache (vLLM's --block-size)",
    "kv_blocks": "blocks in the KV cache (90 %% of 80 GB less the weights, at 128 KiB a token)",
    "prefix_caching": "keep the blocks of past prompts and do not compute them again",
    "eos_after_tokens": "tokens after which an answer ends by itself, unless `ignore_eos`",
    "start_s": "seconds that loading the model takes",
    "fail_start": "fail to load the model, after the start's seconds",
    "crash_after_tokens": "die after this many generated tokens",
    "stall_after_tokens": "generate nothing more after this many tokens, and do not die",
    "sleep_mode": "be able to sleep (vLLM's --enable-sleep-mode)",
    "ignore_sigterm": "do not end on SIGTERM, as vLLM does not while it starts",
}


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add a `--sim-...` flag for each parameter to a parser or to a group of one."""
    for field in msgspec.structs.fields(SimParameters):
        flag = "--sim-" + field.name.replace("_", "-")
        words = _HELP[field.name]
        if isinstance(field.default, bool):
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=field.default, help=words
            )
        elif field.default is None:
            parser.add_argument(flag, metavar="N", default=None, help=words)
        else:
            parser.add_argument(
                flag, metavar="N", default=field.default, help=f"{words} (default {field.default})"
            )


def from_args(args: argparse.Namespace) -> SimParameters:
    """Read the parameters from parsed arguments.

    Raises:
        ValueError: one is out of its bounds; the message names it.
    """
    values: dict[str, Any] = {
        field.name: getattr(args, f"sim_{field.name}") for field in msgspec.structs.fields(SimParameters)
    }
    return msgspec.convert(values, SimParameters, strict=False)
