"""Splitting a firehose's bytes into events, a network chunk at a time.

A job's stream is read with httpx-sse. The firehose carries every token of a service, so its frames are
cut here in whole chunks; it reads only what our own services write: LF line ends, one `data` line.
"""

import msgspec

from rbee_contracts.events import AnyEvent, decode_event

MAX_FRAME_BYTES = 20 * 2**20
"""Bound of one unfinished frame. A job's whole log is at most 16 MiB."""


class FirehoseParser:
    """Keeps what is unfinished between chunks, and the last SSE id.

    A frame that is not an event (a newer peer's, say) is passed over and counted in `undecodable`: to
    end the connection for it would bring it again and again.
    """

    def __init__(self) -> None:
        self._rest = b""
        self.undecodable = 0
        self.last_event_id: str | None = None

    def feed(self, chunk: bytes) -> list[AnyEvent]:
        """Take a chunk; give the events that are complete with it.

        Raises:
            ValueError: a frame has no end within `MAX_FRAME_BYTES`.
        """
        frames = (self._rest + chunk).split(b"\n\n")
        self._rest = frames.pop()
        if len(self._rest) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame is longer than {MAX_FRAME_BYTES} bytes")
        events = []
        last_id = b""
        for frame in frames:
            if frame.startswith(b":"):
                continue
            for line in frame.split(b"\n"):
                if line.startswith(b"data: "):
                    try:
                        events.append(decode_event(line[6:]))
                    except msgspec.DecodeError:
                        self.undecodable += 1
                elif line.startswith(b"id: "):
                    last_id = line[4:]
        if last_id:
            self.last_event_id = last_id.decode()
        return events

    def reset(self) -> None:
        """Forget what is unfinished: the connection it came on is gone."""
        self._rest = b""
