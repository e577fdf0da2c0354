"""One file: ranged requests until all its bytes are here, then the proof that they are the right ones.

huggingface_hub lists what there is, and does not fetch it. Its `hf_hub_download` gives every attempt a
temporary file of its own and deletes that on failure (since 1.18), so that nothing is left to resume; it
blocks a thread that cannot be cancelled; and it compares sizes, not sums. So the bytes come by our own GET,
with `Range` and `If-Range`, which other hives answer just as well.
"""

import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Protocol

import anyio
import anyio.to_thread
import httpx

from rbee_contracts.errors import RbeeError
from rbee_hive.models.source import Patience, RemoteFile, Retryable, Source, unreachable
from rbee_hive.models.space import Reservation, no_space, readable
from rbee_hive.models.staging import FULL_DISK, Folder, Partial

RANGE_BYTES = 16 * 2**30
"""Asked for at once. Some content networks give no answer larger than a few tens of gigabytes."""

WRITE_BYTES = 2**20
"""Gathered before they are written: one visit to a thread for as much."""

RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

Say = Callable[[str, str], None]
"""Narrates: an action, and a message."""


class Sink(Protocol):
    """Is told what arrives."""

    def received(self, file: RemoteFile, size: int) -> None:
        """So many more bytes of a file have come and lie here; negative, when they were thrown away."""


class WrongBytes(Exception):
    """What has come is not the file."""


async def fetch(
    file: RemoteFile,
    source: Source,
    folder: Folder,
    *,
    patience: Patience,
    reservation: Reservation,
    sink: Sink,
    say: Say,
) -> None:
    """Bring one file into `folder`, whole and verified, going on from what is there.

    Wrong bytes are set aside and the file is fetched once more from its beginning.

    Raises:
        NoCapacity: the disk is full; what came is kept.
        RbeeError: the source has refused it, does not answer, or sends something else (`checksum_mismatch`).
    """
    for is_last in (False, True):
        try:
            await _Attempt(file, source, folder, patience, reservation, sink, say).run(fresh=is_last)
        except WrongBytes as exc:
            if is_last:
                raise RbeeError(
                    f"{file.path} of {folder.model} came twice from {source.label} with bytes that are not "
                    f"what it lists: {exc}. Nothing of it is used. Try another source, or later.",
                    code="checksum_mismatch",
                    title="Checksum mismatch",
                ) from exc
            say(
                "model_download_mismatch",
                f"{file.path} from {source.label} is not what it should be: {exc}. Fetching it anew.",
            )
        except OSError as exc:
            if exc.errno not in FULL_DISK:
                raise
            raise no_space(
                f"The disk of the models folder became full while {file.path} of {folder.model} was written. "
                "What came is kept: make room, and download it again to go on."
            ) from exc
        else:
            return


class _Attempt:
    """One file from one source, until it is verified or shown to be wrong."""

    def __init__(
        self,
        file: RemoteFile,
        source: Source,
        folder: Folder,
        patience: Patience,
        reservation: Reservation,
        sink: Sink,
        say: Say,
    ) -> None:
        self._file = file
        self._source = source
        self._folder = folder
        self._patience = patience
        self._reservation = reservation
        self._sink = sink
        self._say = say
        self._fresh = False

    async def run(self, *, fresh: bool) -> None:
        self._fresh = fresh
        partial = await anyio.to_thread.run_sync(self._folder.partial, self._file)
        try:
            while await anyio.to_thread.run_sync(partial.sum_some):
                pass
            await self._fill(partial)
            if partial.is_right():
                await anyio.to_thread.run_sync(partial.sync)
                await anyio.to_thread.run_sync(self._folder.keep, self._file)
                return
            self._count(-partial.size)
        finally:
            partial.close()
        await anyio.to_thread.run_sync(self._folder.set_aside, self._file)
        raise WrongBytes(f"{self._file.size} bytes with another checksum")

    async def _fill(self, partial: Partial) -> None:
        """Ask until all bytes are here.

        Raises:
            RbeeError: the source refuses, or too many tries in a row brought nothing.
        """
        failures, delays = 0, self._delays()
        while partial.size < self._file.size:
            before = partial.size
            try:
                await self._ask(partial)
                if partial.size == before:
                    raise Retryable(f"{self._source.label} sent nothing", self._gave_up("sends nothing"))
            except Retryable as exc:
                if partial.size > before:
                    failures, delays = 0, self._delays()
                failures += 1
                wait = next(delays) if exc.retry_after_s is None else exc.retry_after_s
                if failures >= self._patience.file_attempts or wait > self._patience.retry_after_max_s:
                    raise exc.error from exc
                self._say(
                    "model_download_retry",
                    f"{self._file.path}: {exc.reason}. On from {readable(partial.size)} in {wait:.1f} s.",
                )
                await anyio.sleep(wait)

    def _delays(self) -> Iterator[float]:
        return delays(self._patience)

    async def _ask(self, partial: Partial) -> None:
        """Make one request and write what it brings."""
        start = partial.size
        end = min(start + RANGE_BYTES, self._file.size)
        url, own = self._source.address(self._file.path)
        headers = {**own, "Accept-Encoding": "identity"}
        if start > 0 or end < self._file.size:
            headers["Range"] = f"bytes={start}-{end - 1}"
            if start > 0 and (tag := partial.tag) is not None:
                headers["If-Range"] = tag
        if self._fresh:
            headers["Cache-Control"] = "no-cache"
        try:
            async with self._source.client.stream("GET", url, headers=headers) as response:
                await self._take(response, partial)
        except httpx.TimeoutException as exc:
            raise self._silent("does not answer in time") from exc
        except httpx.TransportError as exc:
            raise self._silent("cannot be reached" if partial.size == start else "broke off") from exc
        except httpx.TooManyRedirects as exc:
            raise self._gave_up("sends from one address to the next") from exc
        except (httpx.InvalidURL, httpx.DecodingError) as exc:
            raise self._gave_up(f"gave an answer that cannot be used ({type(exc).__name__})") from exc

    async def _take(self, response: httpx.Response, partial: Partial) -> None:
        if response.status_code == 416 and partial.size:
            await self._restart(partial, "does not have these bytes any more")
            raise self._silent("does not have the rest of it")
        if response.status_code not in (200, 206):
            refusal = self._source.refusal(response)
            raise refusal
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise self._gave_up("compresses files although asked not to")
        if response.status_code == 206 and not self._is_asked_range(response, partial.size):
            await self._restart(partial, "gave another part than was asked for")
            raise self._silent("gave another part than was asked for")
        if response.status_code == 200 and partial.size:
            await self._restart(partial, "has it anew")
        tag = response.headers.get("ETag", "")
        partial.tag = tag if tag.startswith('"') and tag.isascii() and len(tag) < 1024 else None
        pending = bytearray()
        try:
            async for data in response.aiter_raw():
                pending += data
                if partial.size + len(pending) > self._file.size:
                    pending.clear()
                    self._count(-partial.size)
                    await anyio.to_thread.run_sync(self._folder.set_aside, self._file)
                    raise WrongBytes(f"more than the {self._file.size} bytes that are listed")
                if len(pending) >= WRITE_BYTES:
                    await self._write(partial, bytes(pending))
                    pending.clear()
        finally:
            # What came before a cut or a cancellation is worth keeping.
            if pending:
                with anyio.CancelScope(shield=True):
                    await self._write(partial, bytes(pending))

    async def _write(self, partial: Partial, data: bytes) -> None:
        before = partial.size
        try:
            await anyio.to_thread.run_sync(partial.write, data)
        finally:
            self._count(partial.size - before)

    async def _restart(self, partial: Partial, reason: str) -> None:
        size = partial.size
        await anyio.to_thread.run_sync(partial.restart)
        self._count(-size)
        self._say(
            "model_download_restart",
            f"{self._file.path}: {self._source.label} {reason}, so its {readable(size)} are fetched again.",
        )

    def _count(self, size: int) -> None:
        self._reservation.written(size)
        self._sink.received(self._file, size)

    def _is_asked_range(self, response: httpx.Response, start: int) -> bool:
        given: str = response.headers.get("Content-Range", "")
        return given.startswith(f"bytes {start}-")

    def _silent(self, reason: str) -> Retryable:
        return unreachable(self._source.label, reason)

    def _gave_up(self, reason: str) -> RbeeError:
        return unreachable(self._source.label, reason).error


def delays(patience: Patience) -> Iterator[float]:
    """Give the waits between tries: doubling, each with a quarter of jitter."""
    wait = patience.backoff_first_s
    while True:
        yield wait * random.uniform(0.75, 1.0)
        wait = min(wait * 2, patience.backoff_max_s)


def retry_after_s(value: str | None, now: datetime | None = None) -> float | None:
    """Read a Retry-After header: seconds, or a date. None where it has none that can be read."""
    if not value:
        return None
    if value.isascii() and value.isdigit() and len(value) <= 9:
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())
