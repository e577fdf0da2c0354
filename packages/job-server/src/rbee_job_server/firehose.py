"""The firehose: all jobs' events of one service as one stream, for the hop above and for dashboards.

Frames are `id: <boot>-<seq>` and the event's JSON with its `<n>-<i>` spliced in as `event_id`. A ring
keeps the newest frames so that a follower whose connection dropped goes on where it was; one that asks
for what the ring no longer has gets a `gap` event. There is no back-pressure: a follower that falls
behind the ring gets a gap too. Nothing is encoded while nobody follows.
"""

import asyncio
import itertools
import math
from collections import deque

import msgspec

from rbee_contracts.events import AnyEvent, ExecuteComplete, Gap, encode_event
from rbee_contracts.sse import Position
from rbee_job_server.clock import Clock

RING_BYTES = 8 * 2**20
"""Memory bound of the ring. A follower may be this far behind and lose nothing."""

LINGER_S = 60.0
"""How long frames are still kept after the last follower left."""


_FRAME = b'id: %b-%d\ndata: {"event_id":"%d-%d",%b\n\n'


class _Frame(msgspec.Struct, frozen=True, gc=False):
    full: bytes
    public: bytes
    """Without output and results; empty where nothing is left."""


class Firehose:
    """Only the job server publishes; any number of `Follower`s read."""

    def __init__(self, boot: str, actor: str, clock: Clock) -> None:
        self.boot = boot
        self._boot = boot.encode()
        self._actor = actor
        self._clock = clock
        self._ring: deque[_Frame] = deque()
        self._ring_size = 0
        self._seq = 0
        self._waiters: set[asyncio.Future[None]] = set()
        self._followers: set[Follower] = set()
        self.gaps = 0
        """How often a follower was told that it has missed something."""
        self._unfollowed_since: float | None = None
        self._last_followed: float | None = None
        self.closed = False

    def unfollowed_s(self) -> float:
        """Seconds since anybody followed; infinite when nobody ever did."""
        if self._followers:
            return 0.0
        if self._last_followed is None:
            return math.inf
        return self._clock.monotonic() - self._last_followed

    @property
    def is_followed(self) -> bool:
        """Whether anybody follows, or did within `LINGER_S` and may come back."""
        if self._followers:
            return True
        if self._unfollowed_since is None:
            return False
        if self._clock.monotonic() - self._unfollowed_since < LINGER_S:
            return True
        self._unfollowed_since = None
        self._ring.clear()
        self._ring_size = 0
        return False

    def publish(self, event: AnyEvent, body: bytes, position: Position) -> None:
        """Hand out an event whose JSON is `body`, standing at `position` of its job's stream."""
        self._seq += 1
        if not self.is_followed:
            return
        full = self._frame(position, body)
        public = full
        if event.kind == "output":
            public = b""
        elif isinstance(event, ExecuteComplete) and event.data is not None:
            public = self._frame(position, encode_event(msgspec.structs.replace(event, data=None)))
        self._keep(_Frame(full, public))

    def publish_output(self, body: bytes, narrations: int, outputs: int) -> None:
        """Hand out output of which there is nothing but its JSON, standing there in its job's stream."""
        self._seq += 1
        if self._followers or self.is_followed:
            self._keep(_Frame(_FRAME % (self._boot, self._seq, narrations, outputs, body[1:]), b""))

    def _frame(self, position: Position, body: bytes) -> bytes:
        return _FRAME % (self._boot, self._seq, *position, body[1:])

    def _keep(self, frame: _Frame) -> None:
        self._ring.append(frame)
        self._ring_size += len(frame.full)
        while self._ring_size > RING_BYTES:
            self._ring_size -= len(self._ring.popleft().full)
        if self._waiters:
            self._wake()

    def follow(self, after: tuple[str, int] | None, *, output: bool) -> "Follower":
        """Follow from now, or from after `(boot, seq)`."""
        follower = Follower(self, after, output=output)
        self._followers.add(follower)
        return follower

    def unfollow(self, follower: "Follower") -> None:
        self._followers.discard(follower)
        if not self._followers:
            self._unfollowed_since = self._last_followed = self._clock.monotonic()

    def frames_after(self, seq: int, *, output: bool) -> tuple[int, list[bytes], bool]:
        """Give the newest seq, the frames after `seq`, and whether some between are gone."""
        pending = self._seq - seq
        kept = min(pending, len(self._ring))
        newest_first = itertools.islice(reversed(self._ring), kept)
        found = [frame.full if output else frame.public for frame in newest_first]
        found.reverse()
        return self._seq, found, kept < pending

    def start_frame(self, seq: int) -> bytes:
        return b"retry: 500\nid: %b-%d\n\n" % (self._boot, seq)

    def gap_frame(self, seq: int) -> bytes:
        self.gaps += 1
        gap = Gap(
            message="Events were lost; read your jobs again.",
            actor=self._actor,
            job_id="",
            correlation_id="",
            timestamp=self._clock.timestamp(),
        )
        return b"id: %b-%d\ndata: %b\n\n" % (self._boot, seq, encode_event(gap))

    @property
    def seq(self) -> int:
        return self._seq

    @property
    def followers(self) -> int:
        return len(self._followers)

    @property
    def backlog(self) -> int:
        """Events that the slowest follower has not taken."""
        return max((self._seq - follower.seq for follower in self._followers), default=0)

    @property
    def ring_bytes(self) -> int:
        return self._ring_size

    async def changed(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def close(self) -> None:
        """End every follower's stream, after what is pending."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()


class Follower:
    """One reader of the firehose."""

    def __init__(self, firehose: Firehose, after: tuple[str, int] | None, *, output: bool) -> None:
        self._firehose = firehose
        self._output = output
        self.finished = False
        if after is None:
            self._seq = firehose.seq
            self._head = firehose.start_frame(self._seq)
        elif after[0] != firehose.boot or after[1] > firehose.seq:
            self._seq = firehose.seq
            self._head = firehose.start_frame(self._seq) + firehose.gap_frame(self._seq)
        else:
            self._seq = after[1]
            self._head = firehose.start_frame(self._seq)

    def take(self) -> bytes:
        head, self._head = self._head, b""
        self._seq, frames, missed = self._firehose.frames_after(self._seq, output=self._output)
        if missed:
            # Its id is the place before what follows, in case the connection breaks right after it.
            frames.insert(0, self._firehose.gap_frame(self._seq - len(frames)))
        self.finished = self._firehose.closed
        return head + b"".join(frames)

    async def wait(self) -> None:
        if self._seq == self._firehose.seq and not self._firehose.closed:
            await self._firehose.changed()

    @property
    def seq(self) -> int:
        """The last event that it has taken."""
        return self._seq

    def close(self) -> None:
        self._firehose.unfollow(self)
