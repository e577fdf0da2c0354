"""What can go wrong for a client of a job server.

RbeeError (contracts)
├── Rejected         the service answered with an error; `status`, `code` and `details` are its own
├── Unreachable      no answer: refused, timed out, name unknown
├── StreamCut        a stream ended before its terminal event and could not be resumed
└── ProtocolError    the peer does not speak the job contract
"""

from rbee_contracts.errors import RbeeError


class Rejected(RbeeError):
    """The service refused. `status` is the HTTP status."""

    title = "Rejected"

    def __init__(self, details: str, *, status: int, code: str, title: str) -> None:
        super().__init__(details, code=code, title=title, retryable=status in (429, 503))
        self.status = status


class Unreachable(RbeeError):
    title = "Unreachable"
    default_code = "unreachable"
    default_retryable = True


class StreamCut(RbeeError):
    title = "Stream cut"
    default_code = "stream_cut"
    default_retryable = True


class ProtocolError(RbeeError):
    title = "Protocol error"
    default_code = "protocol_error"
