"""Splitting a firehose's bytes into events, a network chunk at a time.

A job's stream is read with httpx-sse. The firehose carries every token of a service, so its frames are
cut here in whole chunks; it reads only what our own services write: LF line ends, one `data` line.
"""

import msgspec

from rbee_contracts.events import EVENTS, AnyEvent, Error, Narration, decode_event

MAX_FRAME_BYTES = 20 * 2**20
"""Bound of one unfinished frame. A job's whole log is at most 16 MiB."""

_ACTION = b'","action":"'
_OUTPUT_ACTIONS = (b'token"', b'chunk"')
_EVENT_ID_BYTES = len('{"event_id":"') + 31
"""What may stand between the beginning of an event on the firehose and its action: its place."""

_narration_decoder = msgspec.json.Decoder(Narration)


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
        events: list[AnyEvent] = []
        frames = self._split(chunk)
        for frame in frames:
            self._decode(frame, events)
        self._note_id(frames)
        return events

    def feed_raw(self, chunk: bytes) -> list[AnyEvent | bytes]:
        """As `feed`, with output as the JSON that came, for whoever passes it on and need not know it.

        That it is JSON, and of an event, is not checked.
        """
        events: list[AnyEvent | bytes] = []
        frames = self._split(chunk)
        for frame in frames:
            begin = frame.find(b"{")
            action = frame.find(_ACTION, begin, begin + _EVENT_ID_BYTES + len(_ACTION))
            if action > 0 and frame.startswith(_OUTPUT_ACTIONS, action + len(_ACTION)):
                events.append(frame[begin:])
            else:
                self._decode(frame, events)
        self._note_id(frames)
        return events

    def reset(self) -> None:
        """Forget what is unfinished: the connection it came on is gone."""
        self._rest = b""

    def _split(self, chunk: bytes) -> list[bytes]:
        frames = (self._rest + chunk).split(b"\n\n")
        self._rest = frames.pop()
        if len(self._rest) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame is longer than {MAX_FRAME_BYTES} bytes")
        return frames

    def _decode(self, frame: bytes, events: list[AnyEvent] | list[AnyEvent | bytes]) -> None:
        if frame.startswith(b":"):
            return
        for line in frame.split(b"\n"):
            if line.startswith(b"data: "):
                try:
                    events.append(decode_any_event(line[6:]))
                except msgspec.DecodeError:
                    self.undecodable += 1

    def _note_id(self, frames: list[bytes]) -> None:
        """Keep the newest id; one a chunk is enough."""
        for frame in reversed(frames):
            if frame.startswith(b":"):
                continue
            for line in reversed(frame.split(b"\n")):
                if line.startswith(b"id: ") and len(line) > 4:
                    self.last_event_id = line[4:].decode()
                    return


def decode_any_event(data: bytes | str) -> AnyEvent:
    """Decode an event of a peer that may be newer: narration whose `data` has changed is free narration.

    Raises:
        msgspec.DecodeError: it is not an event; or it is one that is acted on, and not as we know it.
    """
    try:
        return decode_event(data)
    except msgspec.ValidationError:
        narration = _narration_decoder.decode(data)
        known = EVENTS.get(narration.action)
        if known is None or known.kind != "narration" or known is Error:
            raise
        if "data" not in known.__struct_fields__:
            raise
        return narration
