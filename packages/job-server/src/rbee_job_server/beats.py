"""Heartbeats: the newest one, for any number of readers; who is slow gets the newest, not a backlog."""

import asyncio

import msgspec

BEAT_EVERY_S = 1.0


class Beats:
    """Holds the newest heartbeat, encoded once."""

    def __init__(self) -> None:
        self.frame = b""
        self.seq = 0
        self.closed = False
        self.followers = 0
        self._changed = asyncio.Event()

    def publish(self, beat: msgspec.Struct) -> None:
        self.frame = b"event: heartbeat\ndata: " + msgspec.json.encode(beat) + b"\n\n"
        self.seq += 1
        self._wake()

    def close(self) -> None:
        """End every reader's stream."""
        self.closed = True
        self._wake()

    def reader(self) -> "BeatReader":
        return BeatReader(self)

    async def changed(self) -> None:
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class BeatReader:
    def __init__(self, beats: Beats) -> None:
        self._beats = beats
        self._seen = 0
        self.finished = False

    def take(self) -> bytes:
        self.finished = self._beats.closed
        if self._seen == self._beats.seq:
            return b""
        self._seen = self._beats.seq
        return self._beats.frame

    async def wait(self) -> None:
        if self._seen == self._beats.seq and not self._beats.closed:
            await self._beats.changed()
