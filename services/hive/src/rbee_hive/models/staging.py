"""Where a download lies until it is whole: hidden in the models folder, by content, published by rename.

    <models folder>/.downloads/<id, with %2F for />/
        lock                      held by the process that downloads
        <key>.part, <key>.tag     bytes of a file so far, and the validator that belongs to them
        <key>                     a whole file, verified and on the disk
        <key>.wrong               bytes that were not what they should be, kept to be looked at
        tree/                     the model's folder while it is put together
        ready/                    the model's folder, whole: only the rename is missing

A key names content (`sha256-…`, `git-…`), so that a file that has not changed is not fetched again when
the model has, and no name from outside becomes a path before the whole listing has been checked.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import structlog
from msgspec.structs import replace

from rbee_contracts.errors import Conflict
from rbee_hive.models.names import is_model_id
from rbee_hive.models.record import HASH_CHUNK_BYTES, Record, RecordedFile, Sums, write_record
from rbee_hive.models.source import RemoteFile

log = structlog.get_logger(__name__)

STAGING_NAME = ".downloads"
LOCK_NAME = "lock"

KEEP_PARTIALS_S = 14 * 86400.0
"""A download that nobody has gone on with for two weeks is given up when the hive starts."""

GIT_BYTES = 16 * 2**20
"""Files up to this may be known to a hub by git's SHA-1 only, wherever they came from."""

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


class Partial:
    """The bytes of one file so far. Blocking; one thread at a time."""

    def __init__(self, path: Path, tag_path: Path, file: RemoteFile) -> None:
        self._path = path
        self._tag_path = tag_path
        self._file = file
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._sums = self._new_sums()
        self._summed = 0
        self.size = os.fstat(self._fd).st_size
        if self.size > file.size:
            self.restart()

    def _new_sums(self) -> Sums:
        return Sums(self._file.size, git=self._file.sha256 is None)

    def close(self) -> None:
        os.close(self._fd)

    def restart(self) -> None:
        """Throw away what is there."""
        os.ftruncate(self._fd, 0)
        self._tag_path.unlink(missing_ok=True)
        self._sums, self._summed, self.size = self._new_sums(), 0, 0

    def sum_some(self) -> bool:
        """Take the next piece of what an earlier run has left into the sums; False when all is in them."""
        if self._summed >= self.size:
            return False
        data = os.pread(self._fd, min(HASH_CHUNK_BYTES, self.size - self._summed), self._summed)
        if not data:
            raise OSError(errno.EIO, "the file is shorter than it was")
        self._sums.feed(data)
        self._summed += len(data)
        return True

    def write(self, data: bytes) -> None:
        """Add bytes at the end.

        Raises:
            OSError: the disk took only some of them, which are kept.
        """
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, self.size)
            self._sums.feed(view[:written])
            self._summed += written
            self.size += written
            view = view[written:]

    @property
    def tag(self) -> str | None:
        """The strong ETag that came with these bytes, where one did."""
        try:
            return self._tag_path.read_text() or None
        except (OSError, UnicodeDecodeError):
            return None

    @tag.setter
    def tag(self, value: str | None) -> None:
        with contextlib.suppress(OSError):  # it saves a transfer at best
            self._tag_path.write_text(value or "")

    def is_right(self) -> bool:
        return self.size == self._file.size and self._file.is_same(
            sha256=self._sums.sha256, git_sha1=self._sums.git_sha1
        )

    def sync(self) -> None:
        os.fsync(self._fd)


class Folder:
    """The staging of one model, owned by one process. Blocking."""

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self.model = model
        self._lock: int | None = None

    def acquire(self) -> None:
        """Become its owner, making it where it is not there; its owner may call this again.

        Raises:
            Conflict: another process downloads this model into this models folder.
        """
        place = self.path / LOCK_NAME
        while self._lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # its owner has just deleted the folder
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                os.close(lock)
                raise Conflict(
                    f"Another hive downloads {self.model} into this models folder. Wait until it has ended.",
                    code="download_elsewhere",
                ) from exc
            if _is_same_file(lock, place):
                self._lock = lock
            else:
                os.close(lock)  # of a folder that its owner has deleted meanwhile

    def release(self) -> None:
        """Leave it to others; a folder in which nothing lies is deleted."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            if os.listdir(self.path) == [LOCK_NAME]:
                self.remove()
        os.close(self._lock)
        self._lock = None

    def size_here(self, file: RemoteFile) -> int:
        """Give how many bytes of a file lie here."""
        for path in (self.path / file.key, self.path / f"{file.key}.part"):
            with contextlib.suppress(OSError):
                return min(os.stat(path, follow_symlinks=False).st_size, file.size)
        return 0

    def has(self, file: RemoteFile) -> bool:
        """Whether a file lies here whole and verified."""
        return (self.path / file.key).is_file()

    def partial(self, file: RemoteFile) -> Partial:
        return Partial(self.path / f"{file.key}.part", self.path / f"{file.key}.tag", file)

    def keep(self, file: RemoteFile) -> None:
        """Take a file's bytes, which are verified and on the disk, for whole."""
        os.replace(self.path / f"{file.key}.part", self.path / file.key)
        (self.path / f"{file.key}.tag").unlink(missing_ok=True)

    def set_aside(self, file: RemoteFile) -> None:
        """Move wrong bytes out of the way."""
        os.replace(self.path / f"{file.key}.part", self.path / f"{file.key}.wrong")
        (self.path / f"{file.key}.tag").unlink(missing_ok=True)

    def drop_wrong(self) -> int:
        """Delete what was set aside; give its bytes."""
        freed = 0
        for path in self.path.glob("*.wrong"):
            with contextlib.suppress(OSError):
                freed += path.stat().st_size
                path.unlink()
        return freed

    def link(self, file: RemoteFile, copy: Path) -> bool:
        """Take a file that lies in another model here; False where the disk cannot link."""
        try:
            os.link(copy, self.path / file.key, follow_symlinks=False)
        except FileExistsError:
            return True
        except OSError:
            return False
        return True

    def build(self, files: Iterable[RemoteFile], record: Record) -> None:
        """Put the model's folder together from whole files, durably, as `ready`."""
        tree, ready = self.path / "tree", self.path / "ready"
        for old in (tree, ready):
            shutil.rmtree(old, ignore_errors=True)
        tree.mkdir()
        written: list[RecordedFile] = []
        for file in files:
            place = tree / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.path / file.key, place)
            except OSError:  # a disk without links: then it is a move
                os.replace(self.path / file.key, place)
            seen = place.stat()
            sha256, git_sha1 = file.sha256, file.git_sha1
            if sha256 is None or seen.st_size <= GIT_BYTES:
                sums = _sum(place, seen.st_size)
                sha256, git_sha1 = sums.sha256, sums.git_sha1
            written.append(
                RecordedFile(
                    path=file.path,
                    size=seen.st_size,
                    mtime_ns=seen.st_mtime_ns,
                    sha256=sha256,
                    git_sha1=git_sha1,
                )
            )
        write_record(tree, replace(record, files=written))
        for folder, _, _ in os.walk(tree):
            _sync(Path(folder))
        os.rename(tree, ready)
        _sync(self.path)

    def remove(self) -> None:
        """Delete all of it. Its owner still has to release it."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    def bytes_here(self) -> int:
        """Give how many bytes it takes."""
        total = 0
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                seen = path.lstat()
                total += seen.st_size if seen.st_nlink == 1 else 0
        return total


class Staging:
    """The staging folders of all downloads into one models folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / STAGING_NAME

    def folder(self, model: str) -> Folder:
        return Folder(self._path / quote(model, safe="@"), model)

    def place(self, model: str) -> Path:
        """Where a model is published."""
        return self._root / model

    def publish(self, folder: Folder) -> None:
        """Give a model that is ready its place. Nothing may lie there."""
        place = self.place(folder.model)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder.path / "ready", place)

    def settle(self, folder: Folder) -> None:
        """Make what was published outlive a power failure, and delete its staging."""
        _sync(self.place(folder.model).parent)
        folder.remove()

    def waiting(self) -> Iterator[tuple[str, int]]:
        """Give the models of which a download has left something, and its bytes."""
        for folder in self._folders():
            yield folder.model, folder.bytes_here()

    def clean(self) -> list[str]:
        """After a start: publish what a crash has left ready, and give up what is too old.

        Gives the ids of what it published.
        """
        published = []
        for folder in self._folders():
            try:
                folder.acquire()
            except (Conflict, OSError):
                continue
            try:
                if (folder.path / "ready").is_dir():
                    if not self.place(folder.model).exists():
                        self.publish(folder)
                        published.append(folder.model)
                    self.settle(folder)
                elif time.time() - folder.path.stat().st_mtime > KEEP_PARTIALS_S:
                    log.info("download_given_up", model=folder.model, reason="nobody has gone on with it")
                    folder.remove()
                else:
                    shutil.rmtree(folder.path / "tree", ignore_errors=True)
            except OSError as exc:
                log.warning("download_clean_up_failed", model=folder.model, reason=exc.strerror)
            finally:
                folder.release()
        return published

    def _folders(self) -> Iterator[Folder]:
        try:
            paths = sorted(self._path.iterdir())
        except OSError:
            return
        for path in paths:
            model = unquote(path.name)
            if is_model_id(model) and path.is_dir() and not path.is_symlink():
                yield Folder(path, model)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sum(path: Path, size: int) -> Sums:
    sums = Sums(size, git=True)
    with path.open("rb") as file:
        while data := file.read(HASH_CHUNK_BYTES):
            sums.feed(data)
    return sums
