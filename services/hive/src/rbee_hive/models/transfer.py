"""One model on its way here: which source, which files, how much of them, until it is published."""

from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Literal, TypeAlias

import anyio
import anyio.to_thread
import structlog
from msgspec import Struct

from rbee_contracts.errors import Conflict, NotFound, RbeeError, Unavailable
from rbee_contracts.events import DownloadProgress, FileProgress
from rbee_hive.models.catalogue import Models
from rbee_hive.models.choose import choose
from rbee_hive.models.fetch import delays, fetch
from rbee_hive.models.hub import HubAccess, HubSource, hub_client
from rbee_hive.models.names import ModelName, check_paths
from rbee_hive.models.peers import PeerSource, peer_client
from rbee_hive.models.progress import Meter, eta_s
from rbee_hive.models.record import Record
from rbee_hive.models.scan import Entry
from rbee_hive.models.source import Listing, Patience, Peer, Peers, RemoteFile, Retryable, Source
from rbee_hive.models.space import Reservation, no_space, readable
from rbee_hive.models.staging import FULL_DISK, Folder, Staging

log = structlog.get_logger(__name__)

FILES_AT_ONCE = 4
NOTES_KEPT = 256
MAX_NAMED = 8
"""Models that the error of a full disk names as ones that could be deleted."""

SourceChoice: TypeAlias = Literal["auto", "hub", "hive"]


class Want(Struct, frozen=True, kw_only=True):
    """What a request asks for. Requests that ask for the same share one transfer."""

    name: ModelName
    patterns: tuple[str, ...] | None
    source: SourceChoice


class Places(Struct, frozen=True, kw_only=True):
    """What every transfer works with. `token` is the cluster's."""

    models: Models
    staging: Staging
    hub: HubAccess
    peers: Peers
    token: str | None


class Outcome(Struct, frozen=True, kw_only=True):
    """How a transfer ended well. `source` is None where everything lay here already."""

    source: str | None
    revision: str | None
    fetched_bytes: int


class Transfer:
    """One transfer, run once. Its watchers read `progress`, `notes` and, once `finished`, how it ended."""

    def __init__(self, want: Want, places: Places) -> None:
        self.want = want
        self.watchers = 0
        self.finished = anyio.Event()
        self.outcome: Outcome | None = None
        self.error: RbeeError | None = None
        self.notes: deque[tuple[int, str, str]] = deque(maxlen=NOTES_KEPT)
        """What happened besides progress: number, action, message."""
        self.noted = 0
        self._places = places
        self._scope = anyio.CancelScope()
        self._meter = Meter()
        self._received = 0
        self._here: dict[str, int] = {}
        self._files: list[RemoteFile] = []
        self._current: dict[str, RemoteFile] = {}

    @property
    def model(self) -> str:
        return self.want.name.id

    @property
    def is_stopping(self) -> bool:
        return self._scope.cancel_called

    def stop(self) -> None:
        """End it soon; what has come is kept."""
        self._scope.cancel()

    async def run(self) -> None:
        """Bring the model here. Never raises: how it ended is in `outcome` or `error`."""
        log.info("download_started", model=self.model, source=self.want.source)
        try:
            with self._scope:
                self.outcome = await self._bring()
            log.info("download_ended", model=self.model, is_complete=self.outcome is not None)
        except RbeeError as exc:
            self.error = exc
            log.warning("download_failed", model=self.model, code=exc.code, reason=exc.details)
        except OSError as exc:
            self.error = _unusable(self.model, exc)
            log.warning("download_failed", model=self.model, code=self.error.code, exc_info=exc)
        except Exception as exc:
            self.error = RbeeError("This is a fault of rbee: the hive's log has the cause.")
            log.error("download_crashed", model=self.model, exc_info=exc)
        finally:
            self.finished.set()

    # --- what watchers see -------------------------------------------------------------------------------

    @property
    def bytes_received(self) -> int:
        """Bytes that have come over the network so far."""
        return self._received

    def progress(self, now: float) -> DownloadProgress | None:
        """Tell how far it is; None before its files are known."""
        if not self._files:
            return None
        self._meter.sample(now, self._received)
        sizes = {file.key: file.size for file in self._files}
        total = sum(sizes.values())
        done = sum(min(self._here.get(key, 0), size) for key, size in sizes.items())
        rate = self._meter.rate()
        return DownloadProgress(
            model=self.model,
            bytes_done=done,
            bytes_total=total,
            rate=round(rate, 1),
            eta_s=eta_s(total - done, rate),
            files_done=sum(
                self._here.get(file.key, 0) >= file.size and file.key not in self._current
                for file in self._files
            ),
            files_total=len(self._files),
            current=[
                FileProgress(path=file.path, bytes_done=self._here.get(key, 0), bytes_total=file.size)
                for key, file in self._current.items()
            ],
        )

    def note(self, action: str, message: str) -> None:
        self.noted += 1
        self.notes.append((self.noted, action, message))

    def received(self, file: RemoteFile, size: int) -> None:
        """Take in that bytes of a file have come (the `Sink` of its files)."""
        self._here[file.key] = max(0, self._here.get(file.key, 0) + size)
        if size > 0:
            self._received += size

    # --- the way here ------------------------------------------------------------------------------------

    async def _bring(self) -> Outcome:
        models = self._places.models
        entry = await anyio.to_thread.run_sync(models.lookup, self.model)
        if entry is not None and (entry.record is None or not entry.is_own):
            self.note(
                "model_download_here",
                f"{self.model} lies here already, put there by hand; delete it first to have it fetched.",
            )
            return Outcome(source=None, revision=None, fetched_bytes=0)
        self._check_name(entry)
        folder = self._places.staging.folder(self.model)
        try:
            return await self._from_any(entry, folder)
        finally:
            folder.release()

    def _check_name(self, entry: Entry | None) -> None:
        """Refuse a name whose place is taken by something that is not this model."""
        place = self._places.staging.place(self.model)
        if entry is None and place.exists():
            raise Conflict(
                f"{self.model} cannot be placed: the models folder has something else of that name, which is "
                "no model. Move it away.",
                code="name_taken",
            )
        if place.parent != self._places.models.root and (place.parent / "config.json").exists():
            raise Conflict(
                f"{self.model} cannot be placed: {place.parent.name} in the models folder is a model itself.",
                code="name_taken",
            )

    async def _from_any(self, entry: Entry | None, folder: Folder) -> Outcome:
        """Try one source after the other; the last one's error is the transfer's."""
        async with self._sources(entry) as sources:
            for source in sources[:-1]:
                try:
                    return await self._from(source, entry, folder, self._places.hub.patience.with_others)
                except RbeeError as exc:
                    if exc.code in ("no_space", "model_in_use"):
                        raise
                    self.note("model_download_fallback", f"{exc.details} Trying {sources[-1].label} instead.")
            try:
                return await self._from(sources[-1], entry, folder, self._places.hub.patience)
            except Unavailable as exc:
                if entry is None:
                    raise
                self.note(
                    "warning",
                    f"{exc.details} {self.model} lies here already and stays as it is; "
                    "whether there is a newer one is not known.",
                )
                assert entry.record is not None
                return Outcome(source=None, revision=entry.record.revision, fetched_bytes=0)

    @asynccontextmanager
    async def _sources(self, entry: Entry | None) -> AsyncIterator[Sequence[Source]]:
        """Give where it can come from, best first. What lies here already is renewed by the hub only."""
        places, want = self._places, self.want
        patience = places.hub.patience
        # In a thread: they read the machine's certificates.
        hub = await anyio.to_thread.run_sync(hub_client, patience)
        others = await anyio.to_thread.run_sync(peer_client, patience)
        async with hub as to_hub, others as to_peers:
            sources: list[Source] = []
            if want.source == "hive" or (want.source == "auto" and entry is None and want.patterns is None):
                sources += [
                    PeerSource(peer, self.model, places.token, to_peers, patience.list_s)
                    for peer in await self._holders()
                ]
            if want.source != "hive":
                sources.append(HubSource(places.hub, want.name, to_hub))
            if not sources:
                raise NotFound(
                    f"No other hive that the queen sees has {self.model}. Take it from the hub: --source hub",
                    code="no_hive_has_it",
                    title="Model not found",
                )
            yield sources

    async def _holders(self) -> Sequence[Peer]:
        """Give the hives that have it. Where the hub may be asked too, a silent queen is no error."""
        try:
            return await self._places.peers.holders(self.model)
        except RbeeError as exc:
            if self.want.source == "hive":
                raise
            self.note("model_download_fallback", f"{exc.details} Trying the hub instead.")
            return ()

    async def _from(self, source: Source, entry: Entry | None, folder: Folder, patience: Patience) -> Outcome:
        """Bring the model from one source.

        Raises:
            RbeeError: that source has not brought it, or it cannot be placed.
        """
        models = self._places.models
        listing = await self._listed(source, patience)
        files = self._choose(source, listing, entry)
        if entry is not None:
            if _is_same(entry, listing, files):
                self.note("model_download_here", f"{self.model} lies here already, as {source.label} has it.")
                return Outcome(source=None, revision=listing.revision, fetched_bytes=0)
            models.refuse_used(self.model, "replaced by a newer revision")
        before = self._received
        await anyio.to_thread.run_sync(folder.acquire)  # no sooner: what is refused leaves no trace
        await self._fetch_all(source, files, folder, patience)
        record = Record(
            model=self.model,
            source=source.label,
            revision=listing.revision,
            downloaded_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.note("model_download_publish", f"All files of {self.model} are here and verified.")
        await anyio.to_thread.run_sync(folder.build, files, record)
        await self._publish(folder)
        return Outcome(source=source.label, revision=listing.revision, fetched_bytes=self._received - before)

    async def _listed(self, source: Source, patience: Patience) -> Listing:
        waits = delays(patience)
        for attempt in range(1, patience.list_attempts + 1):
            try:
                listing = await source.list()
            except Retryable as exc:
                wait = next(waits) if exc.retry_after_s is None else exc.retry_after_s
                if attempt == patience.list_attempts or wait > patience.retry_after_max_s:
                    raise exc.error from exc
                self.note(
                    "model_download_retry",
                    f"{exc.reason[0].upper()}{exc.reason[1:]}. Asking again in {wait:.1f} s.",
                )
                await anyio.sleep(wait)
            else:
                check_paths(
                    (file.path for file in listing.files), f"{source.label[0].upper()}{source.label[1:]}"
                )
                return listing
        raise AssertionError("the last attempt returns or raises")

    def _choose(self, source: Source, listing: Listing, entry: Entry | None) -> list[RemoteFile]:
        """Give the files to have: what is asked for, and what lies here already and is still listed."""
        chosen = set(choose([file.path for file in listing.files], self.want.patterns))
        if entry is not None and entry.record is not None:
            chosen |= {file.path for file in entry.record.files}
        files = [file for file in listing.files if file.path in chosen]
        commit = f" at {listing.revision[:12]}" if listing.revision is not None else ""
        left_out = len(listing.files) - len(files)
        self.note(
            "model_download_plan",
            f"{self.model}{commit} from {source.label}: {len(files)} files, "
            f"{readable(sum(file.size for file in files))}"
            + (f"; {left_out} others that are not needed are left out." if left_out else "."),
        )
        return files

    async def _fetch_all(
        self, source: Source, files: list[RemoteFile], folder: Folder, patience: Patience
    ) -> None:
        """Have every file whole in `folder`: what lies here in another model is linked, the rest fetched."""
        models = self._places.models
        users = set(models.users())
        missing, here = await anyio.to_thread.run_sync(self._take_stock, files, folder)
        self._here = here
        self._meter.sample(anyio.current_time(), self._received)
        self._files = files
        need = sum(file.size - here[file.key] for file in missing)
        reservation = await anyio.to_thread.run_sync(
            lambda: models.space.reserve(need, self.model, lambda: self._remedy(users))
        )
        try:
            await self._fetch_missing(source, missing, folder, reservation, patience)
        finally:
            reservation.release()

    def _take_stock(self, files: list[RemoteFile], folder: Folder) -> tuple[list[RemoteFile], dict[str, int]]:
        """Give the files that are not whole, each content once, the largest first; and the bytes here."""
        copies = self._places.models.copies()
        missing: dict[str, RemoteFile] = {}
        here: dict[str, int] = {}
        for file in files:
            copy = copies.get(file.key)
            is_here = folder.has(file) or (
                copy is not None and copy[1].size == file.size and folder.link(file, copy[0])
            )
            here[file.key] = file.size if is_here else folder.size_here(file)
            if not is_here:
                missing[file.key] = file
        return sorted(missing.values(), key=lambda file: -file.size), here

    async def _fetch_missing(
        self,
        source: Source,
        missing: Iterable[RemoteFile],
        folder: Folder,
        reservation: Reservation,
        patience: Patience,
    ) -> None:
        """Fetch several files at a time; the first that fails stops the others, and is the error."""
        failed: list[Exception] = []
        slots = anyio.Semaphore(FILES_AT_ONCE)

        async def one(file: RemoteFile) -> None:
            async with slots:
                self._current[file.key] = file
                try:
                    await fetch(
                        file,
                        source,
                        folder,
                        patience=patience,
                        reservation=reservation,
                        sink=self,
                        say=self.note,
                    )
                except Exception as exc:
                    failed.append(exc)
                    group.cancel_scope.cancel()
                finally:
                    self._current.pop(file.key, None)

        async with anyio.create_task_group() as group:
            for file in missing:
                group.start_soon(one, file)
        if failed:
            raise failed[0]

    async def _publish(self, folder: Folder) -> None:
        """Put the model in its place: between the check and the last rename nothing else can happen here."""
        places = self._places
        entry = await anyio.to_thread.run_sync(places.models.lookup, self.model)
        with anyio.CancelScope(shield=True):
            if entry is not None:
                places.models.refuse_used(self.model, "replaced by a newer revision")
                places.models.discard(entry)
            else:
                self._check_name(None)
            places.staging.publish(folder)
            places.models.changed()
            await anyio.to_thread.run_sync(places.staging.settle, folder)
            await anyio.to_thread.run_sync(places.models.empty_trash)

    def _remedy(self, used: set[str]) -> str:
        """Say what could be deleted, what was used longest ago first."""
        infos = [
            info for info in self._places.models.find() if info.model not in used and info.model != self.model
        ]
        infos.sort(key=lambda info: (info.last_used_at or "", -info.size_on_disk))
        named = [
            f"{info.model} ({readable(info.size_on_disk)}, "
            + (f"last used {info.last_used_at[:10]})" if info.last_used_at else "not used yet)")
            for info in infos[:MAX_NAMED]
        ]
        named += [
            f"the unfinished download of {model} ({readable(size)})"
            for model, size in self._places.staging.waiting()
            if model != self.model
        ][:MAX_NAMED]
        if not named:
            return "No model here is unused; make room on the disk by other means."
        return f"Could be deleted with `rbee model delete`: {', '.join(named)}."


def _unusable(model: str, exc: OSError) -> RbeeError:
    if exc.errno in FULL_DISK:
        return no_space(
            f"The disk of the models folder became full while {model} was put together. What came is kept: "
            "make room, and download it again to go on."
        )
    return RbeeError(
        f"{model} cannot be written into the models folder: {exc.strerror or exc}. "
        "Check the folder's owner, mode and disk.",
        code="models_folder_unusable",
    )


def _is_same(entry: Entry, listing: Listing, files: Sequence[RemoteFile]) -> bool:
    """Whether what lies here is what is listed, file by file."""
    assert entry.record is not None
    if entry.record.revision != listing.revision:
        return False
    recorded = {file.path: file for file in entry.record.files}
    there = {file.path: (file.size, file.mtime_ns) for file in entry.files}
    for file in files:
        known = recorded.get(file.path)
        if known is None or there.get(file.path) != (known.size, known.mtime_ns):
            return False
        if not file.is_same(sha256=known.sha256, git_sha1=known.git_sha1):
            return False
    return True
