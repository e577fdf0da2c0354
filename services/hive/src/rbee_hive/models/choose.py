"""Which of a repository's files make up the model: what vLLM loads, each weight once. Pure."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from rbee_contracts.errors import InvalidRequest
from rbee_hive.models.names import is_hidden

OTHER_FORMATS = ("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.mlmodel", "*.pb")
"""Weights for other software, never fetched unless a pattern asks for them."""

SECOND_COPIES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "consolidated*.safetensors")
"""Not fetched where there are safetensors beside them: the same weights again."""

OTHER_FOLDERS = ("original/*", "onnx/*", "coreml/*", "openvino/*", "gguf/*")

_is_weights = re.compile(r"[^/]+\.safetensors\Z").match
is_gguf_part = re.compile(r"-\d{5}-of-\d{5}\.gguf\Z").search
"""Whether a file is one of several that only together are a model, which vLLM does not load."""


def choose(paths: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """Give the files to fetch, in their order. Hidden ones are never among them.

    Args:
        patterns: as in huggingface_hub's `allow_patterns`; None for what vLLM needs.

    Raises:
        InvalidRequest: these make no model, or the request must say which of several it wants.
    """
    visible = [path for path in paths if not is_hidden(path)]
    if patterns is not None:
        wanted = [pattern + "*" if pattern.endswith("/") else pattern for pattern in patterns]
        chosen = [path for path in visible if _matches(path, wanted)]
        if not chosen:
            raise InvalidRequest(
                f"None of the {len(visible)} files matches {', '.join(map(repr, patterns))[:200]}. "
                f"There are: {_some(visible)}.",
                code="no_file_matches",
            )
    else:
        chosen = _for_vllm(visible)
    if "config.json" not in chosen and len(_ggufs(chosen)) != 1:
        raise InvalidRequest(
            "The files make no model: a model has a config.json beside its weights, or is one GGUF file. "
            f"There are: {_some(chosen)}.",
            code="not_a_model",
        )
    return chosen


def _for_vllm(paths: Sequence[str]) -> list[str]:
    unwanted = [*OTHER_FORMATS, *OTHER_FOLDERS]
    if any(_is_weights(path) and not path.startswith("consolidated") for path in paths):
        unwanted += [*SECOND_COPIES, "*.gguf"]
    chosen = [path for path in paths if not _matches(path, unwanted)]
    ggufs = _ggufs(chosen)
    if any(is_gguf_part(path) for path in ggufs) and "config.json" not in paths:
        raise InvalidRequest(
            "The model is split over several GGUF files, and vLLM loads only single ones. "
            "Choose another repository, or join them with gguf-split.",
            code="not_a_model",
        )
    if len(ggufs) > 1:
        raise InvalidRequest(
            f"The repository has {len(ggufs)} GGUF files, each of them a model of its own: {_some(ggufs)}. "
            "Name one with allow_patterns.",
            code="choose_a_file",
        )
    return chosen


def _ggufs(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path.endswith(".gguf")]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _some(paths: Sequence[str]) -> str:
    shown = ", ".join(ascii(path)[1:-1][:100] for path in paths[:12]) or "none"
    return f"{shown} and {len(paths) - 12} more" if len(paths) > 12 else shown
