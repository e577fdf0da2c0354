"""The models that lie on this machine: directories and GGUF files in the models folder, by name."""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import anyio
import anyio.to_thread
import structlog
from msgspec.structs import replace

from rbee_contracts.errors import Conflict, NotFound, Unavailable
from rbee_contracts.nodes import Disk, ModelFile, ModelInfo, WorkerInfo
from rbee_hive.models.facts import loads_gguf
from rbee_hive.models.ledger import Ledger
from rbee_hive.models.record import HASH_CHUNK_BYTES, RecordedFile
from rbee_hive.models.scan import Entry, FoundFile, Scanner
from rbee_hive.models.space import Space

log = structlog.get_logger(__name__)

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".gguf", ".pt", ".pth"})

TRASH_NAME = ".trash"
"""In the models folder: what was deleted lies there until its bytes are gone."""

SUM_EVERY_S = 15.0
"""How often the background looks for files without a sum."""

SUM_WAIT_S = 20.0
"""How long a request waits for sums before it is told to come back."""

Users: TypeAlias = Callable[[], Mapping[str, Sequence[str]]]


class Models:
    """Finds models as `<folder>/<name>` or `<folder>/<org>/<name>[@revision]`, and GGUF files likewise.

    Ids are checked by the contracts' pattern before they come here, so they cannot leave the folder; a
    model with a link that does is not listed. Hidden names never belong to a model. `find`, `get` and
    `path` may be called from any thread.

    Args:
        root: the models folder; downloads go there.
        extra_roots: further folders whose models are listed and never changed.
        state_dir: where sums and times of use are remembered; without it they are not.
        gguf: whether GGUF files are models here; by default, whether this Python's vLLM loads them.
    """

    def __init__(
        self,
        root: Path,
        *,
        extra_roots: Sequence[Path] = (),
        state_dir: Path | None = None,
        gguf: bool | None = None,
    ) -> None:
        self.root = root
        self.roots = (root, *(extra for extra in extra_roots if extra != root))
        self.space = Space(root)
        self.users: Users = dict
        """Gives the ids of the workers that have each model loaded; asked on the event loop."""
        self._ledger = Ledger(state_dir)
        self._scanner = Scanner(self.roots, gguf=loads_gguf() if gguf is None else gguf)
        self._wanted: deque[str] = deque()
        self._unreadable: dict[str, str] = {}
        """Models whose sums could not be computed when it was last tried, and why."""
        self._summed = anyio.Event()
        self._sum_now = anyio.Event()

    # --- what is here ------------------------------------------------------------------------------------

    def find(self) -> list[ModelInfo]:
        """Give the models, by name, without their files and users. Cheap enough for every second."""
        return [self._info(entry) for entry in self._scanner.scan().values()]

    def get(self, model: str) -> ModelInfo:
        """Describe one model, with its files.

        Raises:
            NotFound: it does not lie here.
        """
        return self.describe(self.entry(model))

    def path(self, model: str) -> Path:
        """Give what an engine loads a model from: its directory, or its GGUF file.

        Raises:
            NotFound: it does not lie here; says what does.
        """
        entry = self.entry(model)
        return entry.path if entry.gguf is None else entry.file_path(entry.gguf)

    async def listed(self) -> list[ModelInfo]:
        """Give the models as `find` does, with the workers that use each."""
        found = await anyio.to_thread.run_sync(self.find)
        users = self.users()
        return [self.with_users(info, users) for info in found]

    async def described(self, model: str) -> ModelInfo:
        """Describe one model as `get` does, with the workers that use it.

        Raises:
            NotFound: it does not lie here.
        """
        return self.with_users(await anyio.to_thread.run_sync(self.get, model), self.users())

    def with_users(self, info: ModelInfo, users: Mapping[str, Sequence[str]]) -> ModelInfo:
        return replace(info, used_by=list(users.get(info.model, ())))

    def used(self, model: str) -> None:
        """Remember that a worker has been spawned from a model now."""
        self._ledger.use(model, datetime.now(UTC).isoformat(timespec="seconds"))

    def disk(self) -> Disk:
        """Tell the state of the models folder's disk. Cheap enough for every second."""
        total, free = self.space.measure()
        own = (entry for entry in self._scanner.scan().values() if entry.is_own)
        sizes = {file.inode: file.size for entry in own for file in entry.files}
        return Disk(total=total, free=free, reserved=self.space.reserved, models=sum(sizes.values()))

    def entry(self, model: str, *, fresh: bool = True) -> Entry:
        """Give a model as the disk has it.

        Raises:
            NotFound: it does not lie here; says what does.
        """
        entries = self._scanner.scan(deep=fresh)
        entry = entries.get(model)
        if entry is not None:
            return entry
        here = ", ".join(list(entries)[:50]) or "none"
        refused = self._scanner.refused
        names = {path.name for path in refused} | {f"{path.parent.name}/{path.name}" for path in refused}
        reason = (
            "It has a link that leads out of the models folder; make that folder a model folder too."
            if model in names
            else "A model is a directory with a config.json and its weights."
        )
        raise NotFound(
            f"No model {model!r} in {self.root.name}/ of this hive. Models here: {here}. {reason}",
            code="model_not_found",
            title="Model not found",
        )

    def lookup(self, model: str) -> Entry | None:
        """Give a model as the disk has it; None where it does not lie here."""
        return self._scanner.scan(deep=True).get(model)

    def changed(self) -> None:
        """Say that the models folder has been changed."""
        self._scanner.changed()

    def describe(self, entry: Entry) -> ModelInfo:
        """Tell a model with its files; the sum of one that was not computed yet is None."""
        sums = self.sums(entry)
        files = [
            ModelFile(path=file.path, size=file.size, sha256=sums.get(file.path)) for file in entry.files
        ]
        return replace(self._info(entry), file_list=files)

    def _info(self, entry: Entry) -> ModelInfo:
        weights = (file.size for file in entry.files if Path(file.path).suffix in WEIGHT_SUFFIXES)
        return ModelInfo(
            model=entry.model,
            size=sum(weights),
            files=len(entry.files),
            architecture=entry.facts.architecture,
            dtype=entry.facts.dtype,
            max_model_len=entry.facts.max_model_len,
            size_on_disk=sum(file.size for file in entry.files),
            format=entry.format,
            revision=entry.record.revision if entry.record is not None else None,
            last_used_at=self._ledger.last_used(entry.model),
        )

    # --- sums --------------------------------------------------------------------------------------------

    def sums(self, entry: Entry) -> dict[str, str]:
        """Give the SHA-256 of each file of which it is known."""
        recorded = {file.path: file for file in entry.record.files} if entry.record is not None else {}
        found = {}
        for file in entry.files:
            known = recorded.get(file.path)
            if known is not None and (known.size, known.mtime_ns) == (file.size, file.mtime_ns):
                found[file.path] = known.sha256
            else:
                sha256 = self._ledger.sum_of(entry.file_path(file), file.size, file.mtime_ns)
                if sha256 is not None:
                    found[file.path] = sha256
        return found

    def copies(self) -> dict[str, tuple[Path, RecordedFile]]:
        """Give, for each content that downloads have brought here, a file that has it.

        The keys are those of `RemoteFile.key`.
        """
        found: dict[str, tuple[Path, RecordedFile]] = {}
        for entry in self._scanner.scan(deep=True).values():
            if entry.record is None or not entry.is_own:
                continue
            there = {file.path: file for file in entry.files}
            for known in entry.record.files:
                file = there.get(known.path)
                if file is None or (file.size, file.mtime_ns) != (known.size, known.mtime_ns):
                    continue
                found[f"sha256-{known.sha256}"] = (entry.path / known.path, known)
                if known.git_sha1 is not None:
                    found[f"git-{known.git_sha1}"] = (entry.path / known.path, known)
        return found

    async def manifest(self, model: str) -> ModelInfo:
        """Describe one model with every file's sum, for a hive that wants to have it.

        Raises:
            NotFound: it does not lie here.
            Unavailable: its files cannot be read; or the sums are being computed, which takes longer than a
                request may wait.
        """
        self._unreadable.pop(model, None)  # it is tried anew
        with anyio.move_on_after(SUM_WAIT_S):
            while True:
                summed = self._summed
                info = await anyio.to_thread.run_sync(self.get, model)
                if all(file.sha256 is not None for file in info.file_list):
                    return info
                if (reason := self._unreadable.get(model)) is not None:
                    raise Unavailable(
                        f"{model} cannot be read on this hive: {reason}. Check its owner, mode and disk.",
                        code="model_unreadable",
                        retryable=False,
                    )
                if model not in self._wanted:
                    self._wanted.append(model)
                self._sum_now.set()
                await summed.wait()
        raise Unavailable(
            f"The sums of {model} are being computed on this hive. Try again in a minute.",
            code="sums_pending",
        )

    async def compute_sums(self) -> None:
        """Compute the sums of files that lie here without one, slowly unless somebody waits, for ever."""
        while True:
            for entry in list((await anyio.to_thread.run_sync(self._scanner.scan)).values()):
                await self._sum_model(entry.model)
            while self._wanted:
                await self._sum_model(self._wanted.popleft())
            self._sum_now = anyio.Event()
            with anyio.move_on_after(SUM_EVERY_S):
                await self._sum_now.wait()

    async def _sum_model(self, model: str) -> None:
        entry = (await anyio.to_thread.run_sync(self._scanner.scan)).get(model)
        if entry is None:
            self._unreadable.pop(model, None)
            return
        known = self.sums(entry)
        failure = None
        for file in entry.files:
            if file.path not in known:
                failure = await self._sum_file(entry.file_path(file), file) or failure
        self._note_unreadable(model, failure)
        if model in self._wanted:
            self._wanted.remove(model)
        self._summed.set()
        self._summed = anyio.Event()

    def _note_unreadable(self, model: str, failure: str | None) -> None:
        """Remember why a model's sums are not known, and log it when it is news."""
        if failure is None:
            self._unreadable.pop(model, None)
        elif self._unreadable.get(model) != failure:
            self._unreadable[model] = failure
            log.warning("sums_failed", model=model, reason=failure)

    async def _sum_file(self, path: Path, file: FoundFile) -> str | None:
        """Compute one file's sum; give why it could not be.

        Every second piece of time is left to others, unless somebody waits.
        """
        digest = hashlib.sha256()
        try:
            with path.open("rb") as opened:
                while True:
                    begun = anyio.current_time()
                    if not await anyio.to_thread.run_sync(_digest_some, opened.fileno(), digest):
                        break
                    if not self._wanted:
                        await anyio.sleep(anyio.current_time() - begun)
                seen = os.fstat(opened.fileno())
        except OSError as exc:
            return exc.strerror or str(exc)
        if (seen.st_size, seen.st_mtime_ns) == (file.size, file.mtime_ns):
            self._ledger.learn(path, file.size, file.mtime_ns, digest.hexdigest())
        return None

    # --- deleting ----------------------------------------------------------------------------------------

    def refuse_used(self, model: str, what: str) -> None:
        """Refuse to touch the files of a model that workers have loaded. Called on the event loop.

        Raises:
            Conflict: there are such workers; names them.
        """
        workers = self.users().get(model, ())
        if workers:
            raise Conflict(
                f"{model} cannot be {what}: it is in use by {', '.join(workers)}. "
                "Stop its workers first: rbee worker stop WORKER",
                code="model_in_use",
                title="Model in use",
            )

    def discard(self, entry: Entry) -> tuple[Path, int]:
        """Take a model away: it is gone at once, whole, and its bytes lie in the trash until `empty_trash`.

        Gives its place in the trash and the bytes that this frees; files that other models share stay.
        Called on the event loop, right after `refuse_used`.

        Raises:
            Conflict: it lies in a folder that is not rbee's to change.
        """
        if not entry.is_own:
            raise Conflict(
                f"{entry.model} lies in an extra folder, which rbee never changes. Delete it by hand.",
                code="model_elsewhere",
            )
        trash = self.root / TRASH_NAME
        trash.mkdir(exist_ok=True)
        place = trash / uuid.uuid4().hex
        freed = {file.inode: file.size for file in entry.files if file.links == 1}
        os.rename(entry.path, place)
        self._scanner.changed()
        self._ledger.forget(entry.model, entry.path)
        if entry.path.parent != self.root:
            with contextlib.suppress(OSError):
                entry.path.parent.rmdir()  # the organisation's folder, when this was its last model
        return place, sum(freed.values())

    def empty_trash(self) -> None:
        """Delete the bytes of what was discarded; what a crash has left, too."""
        trash = self.root / TRASH_NAME
        try:
            places = list(trash.iterdir())
        except OSError:
            return
        for place in places:
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    place.unlink()
        with contextlib.suppress(OSError):
            trash.rmdir()


def users_by_model(workers: Iterable[WorkerInfo]) -> dict[str, list[str]]:
    """Give the workers that have each model loaded, or are loading it. Pure."""
    users: dict[str, list[str]] = {}
    for worker in workers:
        if worker.state not in ("stopped", "failed"):
            users.setdefault(worker.model, []).append(worker.worker_id)
    return users


def _digest_some(descriptor: int, digest: "hashlib._Hash") -> bool:
    """Feed the next piece of a file; False at its end."""
    data = os.read(descriptor, HASH_CHUNK_BYTES)
    digest.update(data)
    return bool(data)
