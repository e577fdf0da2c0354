"""W3C Trace Context: where a request stands in its caller's trace, as two headers carry it down the hops."""

import re

from msgspec import Struct

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

MAX_TRACESTATE_CHARS = 512
"""What is longer is dropped whole; the trace goes on without it."""

_ids = r"(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_match = re.compile(rf"(?!ff)([0-9a-f]{{2}})-({_ids})(-[ -~]*)?\Z").match
_is_state = re.compile(r"[ -~]+\Z").match


class TraceContext(Struct, frozen=True, gc=False):
    """The caller's span, as `traceparent` names it; `tracestate` is what tracing systems add to it."""

    traceparent: str
    tracestate: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What a request carries."""
        headers = {TRACEPARENT: self.traceparent}
        if self.tracestate is not None:
            headers[TRACESTATE] = self.tracestate
        return headers


def parse_trace(traceparent: str, tracestate: str | None = None) -> TraceContext | None:
    """Read what a caller sent; None where it names no span, which is then as if nothing had been sent.

    Of a version after 00, whose header may be longer, the part is taken that all versions have.
    """
    found = _match(traceparent)
    if found is None or (found[1] == "00" and found[3] is not None):
        return None
    if tracestate is not None and not (len(tracestate) <= MAX_TRACESTATE_CHARS and _is_state(tracestate)):
        tracestate = None
    return TraceContext(f"00-{found[2]}", tracestate)
