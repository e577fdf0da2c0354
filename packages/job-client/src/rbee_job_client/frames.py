"""Splitting the bytes of event streams into frames, a network chunk at a time.

Any event stream is read by `StreamParser`. The firehose carries every token of a service and has a parser
of its own, which reads only what our own services write: LF line ends, one `data` line.
"""

from typing import NamedTuple

import msgspec

from rbee_contracts.events import EVENTS, AnyEvent, Error, Narration, decode_event

MAX_FRAME_BYTES = 20 * 2**20
"""Bound of one unfinished frame. A job's whole log is at most 16 MiB."""

_ACTION = b'","action":"'
_OUTPUT_ACTIONS = (b'token"', b'chunk"')
_EVENT_ID_BYTES = len('{"event_id":"') + 31
"""What may stand between the beginning of an event on the firehose and its action: its place."""

_narration_decoder = msgspec.json.Decoder(Narration)


class _Splitter:
    """Cuts what comes at empty lines, and keeps what is unfinished."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._rest_bytes = 0

    def split(self, chunk: bytes) -> list[bytes]:
        """Take a chunk; give the frames that are complete with it.

        Raises:
            ValueError: a frame has no end within `MAX_FRAME_BYTES`.
        """
        if self._rest:
            is_cut_between = chunk.startswith(b"\n") and self._rest[-1].endswith(b"\n")
            if is_cut_between or b"\n\n" in chunk:
                chunk = b"".join((*self._rest, chunk))
                self._rest.clear()
                self._rest_bytes = 0
        *frames, rest = chunk.split(b"\n\n")
        if rest:
            self._rest.append(rest)
            self._rest_bytes += len(rest)
            if self._rest_bytes > MAX_FRAME_BYTES:
                raise ValueError(f"a frame is longer than {MAX_FRAME_BYTES} bytes")
        return frames


class Frame(NamedTuple):
    """One event of a stream. `id` is the newest that the stream had given by then."""

    event: str
    data: str
    id: str


class StreamParser:
    """Reads an event stream as its standard says, of one connection.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """

    def __init__(self) -> None:
        self._splitter = _Splitter()
        self._is_after_cr = False
        self._id = ""

    def feed(self, chunk: bytes) -> list[Frame]:
        """Take a chunk; give the frames with data that are complete with it.

        Raises:
            ValueError: a frame has no end within `MAX_FRAME_BYTES`.
        """
        if self._is_after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._is_after_cr = False
        if b"\r" in chunk:
            self._is_after_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        elif chunk:
            self._is_after_cr = False
        frames = map(self._read, self._splitter.split(chunk))
        return [frame for frame in frames if frame.data]

    def _read(self, frame: bytes) -> Frame:
        event, data = "", []
        for line in frame.decode(errors="replace").split("\n"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                data.append(value)
            elif name == "event":
                event = value
            elif name == "id" and "\0" not in value:
                self._id = value
        return Frame(event, "\n".join(data), self._id)


class FirehoseParser:
    """Keeps what is unfinished between chunks, and the last SSE id.

    A frame that is not an event (a newer peer's, say) is passed over and counted in `undecodable`: to
    end the connection for it would bring it again and again.
    """

    def __init__(self) -> None:
        self._splitter = _Splitter()
        self.undecodable = 0
        self.last_event_id: str | None = None

    def feed(self, chunk: bytes) -> list[AnyEvent]:
        """Take a chunk; give the events that are complete with it.

        Raises:
            ValueError: a frame has no end within `MAX_FRAME_BYTES`.
        """
        events: list[AnyEvent] = []
        frames = self._splitter.split(chunk)
        for frame in frames:
            self._decode(frame, events)
        self._note_id(frames)
        return events

    def feed_raw(self, chunk: bytes) -> list[AnyEvent | bytes]:
        """As `feed`, with output as the JSON that came, for whoever passes it on and need not know it.

        That it is JSON, and of an event, is not checked.
        """
        events: list[AnyEvent | bytes] = []
        frames = self._splitter.split(chunk)
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
        self._splitter = _Splitter()

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
