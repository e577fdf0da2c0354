"""Names from outside, checked before any of them becomes a path here. Pure."""

import re
from collections.abc import Iterable

from msgspec import Struct

from rbee_contracts.errors import InvalidRequest
from rbee_contracts.ids import MODEL_ID_PATTERN

MAX_FILES = 10_000
"""Files that one model may have."""

MAX_PATH_CHARS = 1024
MAX_NAME_BYTES = 255
MAX_DEPTH = 16

_is_model_id = re.compile(MODEL_ID_PATTERN).match
_control = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\\]").search


class ModelName(Struct, frozen=True):
    """A model id taken apart: the repository on the hub, and the revision that was asked for."""

    repo: str
    revision: str | None = None

    @property
    def id(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_model_id(text: str) -> bool:
    """Whether a text may name a model: what does not is neither listed nor looked for."""
    return _is_model_id(text) is not None


def parse_model(model: str, revision: str | None = None) -> ModelName:
    """Take a model id apart. `revision` is the request's own field, where it has one.

    Raises:
        InvalidRequest: it is no model id, or names one revision in its id and another beside it.
    """
    if not is_model_id(model):
        raise InvalidRequest(
            f"{model[:100]!r} is no model id. Give a name, org/name or org/name@revision.",
            code="invalid_field",
        )
    repo, _, named = model.partition("@")
    if named and revision is not None and named != revision:
        raise InvalidRequest(
            f"{model!r} names the revision {named!r}, and the field `revision` names {revision!r}. "
            "Give one of them.",
            code="invalid_field",
        )
    return ModelName(repo, named or revision)


def check_path(path: str, where: str) -> str:
    """Give a file's path back where it can only lie inside the model's own folder.

    Args:
        path: as `where` told it, with `/` between its parts.
        where: who told it, for the error.

    Raises:
        InvalidRequest: it could lie elsewhere, or no file of that name can be made here.
    """
    if not path or len(path) > MAX_PATH_CHARS:
        raise _unsafe(path, where, f"it is empty or longer than {MAX_PATH_CHARS} characters")
    if _control(path):
        raise _unsafe(path, where, "it has a backslash or a character that no file name may have")
    parts = path.split("/")
    if len(parts) > MAX_DEPTH:
        raise _unsafe(path, where, f"it lies more than {MAX_DEPTH} folders deep")
    for part in parts:
        if part in ("", ".", ".."):
            raise _unsafe(path, where, "it could lie outside the model's folder")
        if len(part.encode()) > MAX_NAME_BYTES:
            raise _unsafe(path, where, f"one of its parts is longer than {MAX_NAME_BYTES} bytes")
    return path


def check_paths(paths: Iterable[str], where: str) -> None:
    """Check all files of a model together.

    Raises:
        InvalidRequest: one is not safe, there are too many, or two cannot lie in one folder.
    """
    files: set[str] = set()
    folders: set[str] = set()
    for count, path in enumerate(paths, 1):
        if count > MAX_FILES:
            raise InvalidRequest(
                f"{where} lists more than {MAX_FILES} files; a model has fewer.", code="unsafe_file_name"
            )
        check_path(path, where)
        if path in files:
            raise _unsafe(path, where, "it is listed twice")
        files.add(path)
        parts = path.split("/")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    for path in sorted(files & folders):
        raise _unsafe(path, where, "it is a file and a folder at once")


def is_hidden(path: str) -> bool:
    """Whether a file or one of its folders begins with a dot: never part of a model."""
    return any(part.startswith(".") for part in path.split("/"))


def _unsafe(path: str, where: str, reason: str) -> InvalidRequest:
    shown = ascii(path if len(path) <= 80 else f"{path[:77]}...")
    return InvalidRequest(
        f"{where} lists a file named {shown}, which is refused: {reason}. Nothing was written.",
        code="unsafe_file_name",
        title="Unsafe file name",
    )
