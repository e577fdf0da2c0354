"""Where a model's files can come from: what every source gives, and the errors it may raise."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import httpx
from msgspec import Struct
from msgspec.structs import replace

from rbee_contracts.errors import RbeeError, Unavailable


class Patience(Struct, frozen=True, kw_only=True):
    """How long a download waits for whom it takes from. Seconds.

    Args:
        connect_s: to open a connection.
        read_s: of silence on it; then the connection is given up and taken up again.
        list_s: for the whole answer that lists a model's files.
        list_attempts: tries to get that list.
        file_attempts: tries in a row that bring no byte of a file.
        backoff_first_s: between the first two tries; doubles from there.
        backoff_max_s: the longest of these.
        retry_after_max_s: the longest Retry-After that is waited for; one that asks for more is an error.
    """

    connect_s: float = 10.0
    read_s: float = 30.0
    list_s: float = 60.0
    list_attempts: int = 5
    file_attempts: int = 8
    backoff_first_s: float = 0.5
    backoff_max_s: float = 30.0
    retry_after_max_s: float = 120.0

    @property
    def with_others(self) -> "Patience":
        """As this, for a source after which another one can be tried: fewer tries."""
        return replace(
            self, list_attempts=min(self.list_attempts, 2), file_attempts=min(self.file_attempts, 3)
        )


class RemoteFile(Struct, frozen=True, kw_only=True):
    """A file as its source lists it: at least one of the sums is known."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def key(self) -> str:
        """Name the content: equal for equal files, whichever source they come from."""
        return f"sha256-{self.sha256}" if self.sha256 is not None else f"git-{self.git_sha1}"

    def is_same(self, *, sha256: str, git_sha1: str | None) -> bool:
        """Whether bytes with these sums are this file."""
        if self.sha256 is not None:
            return sha256 == self.sha256
        return git_sha1 == self.git_sha1


class Listing(Struct, frozen=True, kw_only=True):
    """A model's files at one commit; `revision` is None where the source does not know it."""

    revision: str | None
    files: list[RemoteFile]


class Retryable(Exception):
    """An attempt failed in a way that another one may mend.

    Args:
        reason: for people, a sentence without its end.
        retry_after_s: what the other side asked for.
        error: what to raise when no attempt helps.
    """

    def __init__(self, reason: str, error: RbeeError, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.error = error
        self.retry_after_s = retry_after_s


class Source(Protocol):
    """One place a model can be taken from."""

    kind: str
    """`hub` or `hive`."""

    label: str
    """What to call it, e.g. `the hub` or `hive box2`."""

    client: httpx.AsyncClient
    """Fetches its files; knows what may be sent to whom."""

    async def list(self) -> Listing:
        """List the model's files.

        Raises:
            Retryable: it could not be asked, or could not answer.
            RbeeError: it has answered no.
        """

    def address(self, path: str) -> tuple[str, Mapping[str, str]]:
        """Give the URL of a file, and the headers to ask for it with."""

    def refusal(self, response: httpx.Response) -> RbeeError | Retryable:
        """Say what an answer that brings no bytes means."""


class Peers(Protocol):
    """Knows which other hives of the cluster have a model."""

    async def holders(self, model: str) -> Sequence["Peer"]:
        """Give the hives that have it, those that answered last first.

        Raises:
            RbeeError: who knows it does not answer.
        """


class Peer(Struct, frozen=True):
    """Another hive, as the queen tells it."""

    hive_id: str
    url: str


class NoPeers:
    """A hive on its own has none."""

    async def holders(self, model: str) -> Sequence[Peer]:
        return ()


def unreachable(label: str, reason: str) -> Retryable:
    """Say that a source does not answer."""
    remedy = (
        "See why with `rbee hive check`. What was fetched is kept, and the same download goes on from there; "
        "another hub is set by --hub-endpoint or HF_ENDPOINT where the hive is started."
    )
    told = f"{label[:1].upper()}{label[1:]} {reason}. {remedy}"
    return Retryable(f"{label} {reason}", Unavailable(told, code="source_unavailable", title="Unavailable"))
