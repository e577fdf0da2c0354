"""The models that lie on this machine: directories in the models folder, by name."""

from pathlib import Path
from typing import Any

import msgspec

from rbee_contracts.errors import NotFound
from rbee_contracts.nodes import ModelInfo

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".gguf", ".pt"})


class Models:
    """Finds models as `<models folder>/<name>` or `<models folder>/<org>/<name>`.

    Ids are checked by the contracts' pattern before they come here, so they cannot leave the folder;
    a link that does is not listed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self) -> list[ModelInfo]:
        """Give the models, by name. Reads directories and config.json, not weights."""
        return [_info(self._id(path), path) for path in self._directories()]

    def get(self, model: str) -> ModelInfo:
        """Describe one model.

        Raises:
            NotFound: it does not lie here.
        """
        return _info(model, self.path(model))

    def path(self, model: str) -> Path:
        """Give a model's directory.

        Raises:
            NotFound: it does not lie here; says what does.
        """
        for path in self._directories():
            if self._id(path) == model:
                return path
        here = ", ".join(self._id(path) for path in self._directories()) or "none"
        raise NotFound(
            f"No model {model!r} in {self.root.name}/ of this hive. Models here: {here}. "
            "A model is a directory with a config.json and its weights.",
            code="model_not_found",
            title="Model not found",
        )

    def _id(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _directories(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        root = self.root.resolve()
        found = []
        for pattern in ("*/config.json", "*/*/config.json"):
            for config in self.root.glob(pattern):
                directory = config.parent
                if directory.resolve().is_relative_to(root) and not any(
                    part.startswith(".") for part in directory.relative_to(self.root).parts
                ):
                    found.append(directory)
        return sorted(found)


def _info(model: str, path: Path) -> ModelInfo:
    config = _config(path / "config.json")
    files = [file for file in path.iterdir() if file.is_file()]
    architectures = config.get("architectures")
    dtype = config.get("dtype") or config.get("torch_dtype")
    length = config.get("max_position_embeddings")
    return ModelInfo(
        model=model,
        size=sum(file.stat().st_size for file in files if file.suffix in WEIGHT_SUFFIXES),
        files=len(files),
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        dtype=dtype if isinstance(dtype, str) else None,
        max_model_len=length if isinstance(length, int) else None,
    )


def _config(path: Path) -> dict[str, Any]:
    """Read config.json; one that cannot be read tells nothing, and vLLM will say why."""
    try:
        config = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
