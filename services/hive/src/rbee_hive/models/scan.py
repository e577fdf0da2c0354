"""Looking at the folders of models: what is one, which files it has, and that no link leads out."""

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import structlog
from msgspec import Struct

from rbee_hive.models.choose import is_gguf_part
from rbee_hive.models.facts import Facts, config_facts, gguf_facts
from rbee_hive.models.names import MAX_DEPTH, MAX_FILES, is_model_id
from rbee_hive.models.record import Record, read_record

log = structlog.get_logger(__name__)

DEEP_SCAN_EVERY_S = 10.0
"""How late a change inside a folder that keeps the folder's own mtime is seen: a file written in place."""

RACY_S = 2.0
"""A folder that changed so lately may change again without another mtime."""

Format: TypeAlias = Literal["safetensors", "gguf", "other"]


class FoundFile(Struct, frozen=True):
    """One file of a model as the disk has it."""

    path: str
    size: int
    mtime_ns: int
    inode: tuple[int, int]
    links: int


class Entry(Struct, frozen=True, kw_only=True):
    """One model as the disk has it. `path` is its folder, or the GGUF file that is all of it."""

    model: str
    path: Path
    root: Path
    is_own: bool
    files: tuple[FoundFile, ...]
    facts: Facts
    record: Record | None
    format: Format

    def file_path(self, file: FoundFile) -> Path:
        return self.path if self.path.name == file.path and not self.path.is_dir() else self.path / file.path

    @property
    def gguf(self) -> FoundFile | None:
        if self.format != "gguf":
            return None
        return next(file for file in self.files if file.path.endswith(".gguf"))


class _LeavesRoots(Exception):
    """A link leads out of the folders that models may lie in."""


class Scanner:
    """Finds what lies in the folders. Safe to use from any thread.

    Args:
        roots: the folders, the models folder first; a name that is in several counts for the first.
        gguf: whether GGUF files are models.
    """

    def __init__(self, roots: Sequence[Path], *, gguf: bool) -> None:
        self.refused: set[Path] = set()
        """What would be a model if no link of it led out of the folders."""
        self._roots = tuple(roots)
        self._gguf = gguf
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._stamps: dict[Path, int] = {}
        self._scanned_at: float | None = None
        self._facts: dict[Path, tuple[tuple[int, int], Facts]] = {}

    def changed(self) -> None:
        """Say that a folder has been changed, so that the next look is a real one."""
        self._scanned_at = None

    def scan(self, *, deep: bool = False) -> dict[str, Entry]:
        """Look at the folders. Not `deep`: only where a folder's mtime tells of a change, or it is time."""
        with self._lock:
            if not deep and self._is_fresh():
                return self._entries
            begun = time.time_ns() - int(RACY_S * 1e9)
            self._stamps = {}
            self.refused = set()
            entries: dict[str, Entry] = {}
            for root in self._roots:
                for entry in self._models_in(root):
                    entries.setdefault(entry.model, entry)
            self._facts = {path: self._facts[path] for path in self._facts if path.parent in self._stamps}
            is_settled = all(stamp < begun for stamp in self._stamps.values())
            self._scanned_at = time.monotonic() if is_settled else None
            self._entries = dict(sorted(entries.items()))
            return self._entries

    def _is_fresh(self) -> bool:
        if self._scanned_at is None or time.monotonic() - self._scanned_at > DEEP_SCAN_EVERY_S:
            return False
        return all(_mtime_ns(folder) == stamp for folder, stamp in self._stamps.items())

    def _models_in(self, root: Path) -> Iterator[Entry]:
        for name, path in self._visible(root):
            entry = self._entry_at(root, path, name)
            if entry is not None:
                yield entry
            elif path.is_dir() and path not in self.refused and "@" not in name:
                for inner, inner_path in self._visible(path):
                    entry = self._entry_at(root, inner_path, f"{name}/{inner}")
                    if entry is not None:
                        yield entry

    def _visible(self, folder: Path) -> list[tuple[str, Path]]:
        """Give what lies in a folder and may be a model or hold one."""
        self._stamps[folder] = _mtime_ns(folder)
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            return []
        return [(name, folder / name) for name in names if not name.startswith(".")]

    def _entry_at(self, root: Path, path: Path, model: str) -> Entry | None:
        if not is_model_id(model):
            return None
        try:
            if path.suffix == ".gguf" and path.is_file():
                is_model = self._gguf and not is_gguf_part(path.name)
                return self._gguf_file(root, path, model) if is_model else None
            if not path.is_dir():
                return None
            has_config = (path / "config.json").is_file()
            if not has_config and not (self._gguf and any(path.glob("*.gguf"))):
                self._check_link(path)
                return None
            return self._directory(root, path, model, has_config)
        except _LeavesRoots:
            self.refused.add(path)
        except OSError as exc:
            log.warning("model_unreadable", model=model, reason=exc.strerror)
        return None

    def _gguf_file(self, root: Path, path: Path, model: str) -> Entry:
        self._check_link(path)
        file = _found(path, path.name)
        return Entry(
            model=model,
            path=path,
            root=root,
            is_own=root == self._roots[0],
            files=(file,),
            facts=self._facts_of(path, file, gguf_facts),
            record=None,
            format="gguf",
        )

    def _directory(self, root: Path, path: Path, model: str, has_config: bool) -> Entry | None:
        self._check_link(path)
        files = tuple(sorted(self._files_in(path), key=lambda file: file.path))
        ggufs = [file for file in files if file.path.endswith(".gguf")]
        suffixes = {Path(file.path).suffix for file in files}
        kind: Format = "safetensors" if ".safetensors" in suffixes else "other"
        if kind == "other" and ggufs and not suffixes & {".bin", ".pt", ".pth"}:
            if not self._gguf or len(ggufs) != 1 or "/" in ggufs[0].path:
                return None
            kind = "gguf"
        config = next((file for file in files if file.path == "config.json"), None)
        facts = Facts()
        if config is not None and has_config:
            facts = self._facts_of(path / "config.json", config, config_facts)
        elif kind == "gguf":
            facts = self._facts_of(path / ggufs[0].path, ggufs[0], gguf_facts)
        else:
            return None
        return Entry(
            model=model,
            path=path,
            root=root,
            is_own=root == self._roots[0],
            files=files,
            facts=facts,
            record=read_record(path),
            format=kind,
        )

    def _files_in(self, folder: Path, prefix: str = "", depth: int = 0) -> Iterator[FoundFile]:
        count = 0
        self._stamps[folder] = _mtime_ns(folder)
        with os.scandir(folder) as found:
            for item in found:
                if item.name.startswith("."):
                    continue
                path = Path(item.path)
                if item.is_symlink():
                    self._check_link(path)
                if item.is_dir() and depth < MAX_DEPTH:
                    yield from self._files_in(path, f"{prefix}{item.name}/", depth + 1)
                elif item.is_file():
                    count += 1
                    if count > MAX_FILES:
                        return
                    yield _found(path, prefix + item.name)

    def _check_link(self, path: Path) -> None:
        """Raise `_LeavesRoots` where a path leads, through links, out of all folders of models."""
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(os.path.realpath(root)) for root in self._roots):
            raise _LeavesRoots

    def _facts_of(self, path: Path, file: FoundFile, read: Callable[[Path], Facts]) -> Facts:
        state = (file.size, file.mtime_ns)
        known = self._facts.get(path)
        if known is None or known[0] != state:
            known = state, read(path)
            self._facts[path] = known
        return known[1]


def _mtime_ns(folder: Path) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1


def _found(path: Path, name: str) -> FoundFile:
    seen = os.stat(path)
    if not stat.S_ISREG(seen.st_mode):
        raise OSError(f"{name} is no file")
    return FoundFile(name, seen.st_size, seen.st_mtime_ns, (seen.st_dev, seen.st_ino), seen.st_nlink)
