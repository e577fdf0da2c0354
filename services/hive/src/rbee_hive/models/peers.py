"""Other hives as a source: whom the queen names, what they have, and their files by range.

The cluster's token is sent to the addresses that the queen tells and to no other: redirects are not followed.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from urllib.parse import quote

import anyio
import httpx
import msgspec

from rbee_contracts.errors import ErrorBody, NotFound, RbeeError, Unauthorized, Unavailable
from rbee_contracts.events import Error, ExecuteComplete
from rbee_contracts.nodes import HiveListResult, ModelInfo
from rbee_contracts.operations import HiveList
from rbee_hive.models.fetch import RETRY_STATUS, retry_after_s
from rbee_hive.models.source import Listing, Patience, Peer, RemoteFile, Retryable, unreachable
from rbee_job_client import JobClient

_is_sha256 = re.compile(r"[0-9a-f]{64}\Z").match

ASK_QUEEN_S = 15.0
MAX_MANIFEST_BYTES = 16 * 2**20


class QueenPeers:
    """Asks the queen which hives have a model.

    Args:
        queen_url: where she is.
        token: the cluster's.
        hive_id: this hive's own, which is none of its peers.
    """

    def __init__(self, queen_url: str, token: str | None, hive_id: str) -> None:
        self._queen_url = queen_url
        self._token = token
        self._hive_id = hive_id

    async def holders(self, model: str) -> Sequence[Peer]:
        listed: HiveListResult | None = None
        reason = "she did not answer in time"
        with anyio.move_on_after(ASK_QUEEN_S):
            async with (
                JobClient(self._queen_url, token=self._token) as queen,
                aclosing(queen.submit_and_stream(HiveList())) as events,
            ):
                async for event in events:
                    if isinstance(event, Error):
                        reason = event.message
                    if isinstance(event, ExecuteComplete):
                        listed = msgspec.convert(event.data, HiveListResult)
        if listed is None:
            raise Unavailable(
                f"The queen at {self._queen_url} does not tell her hives: {reason}.", code="no_queen"
            )
        holders = [
            (hive.last_seen_s or 0.0, Peer(hive.hive_id, hive.url.rstrip("/")))
            for hive in listed.hives
            if hive.hive_id != self._hive_id
            and hive.state == "online"
            and any(info.model == model for info in hive.models)
        ]
        return [peer for _, peer in sorted(holders, key=lambda holder: holder[0])]


class PeerSource:
    """Lists and addresses one model's files on another hive."""

    kind = "hive"

    def __init__(
        self, peer: Peer, model: str, token: str | None, client: httpx.AsyncClient, list_s: float
    ) -> None:
        self.label = f"hive {peer.hive_id}"
        self.client = client
        self._base = f"{peer.url}/v1/models/{quote(model)}"
        self._model = model
        self._headers = {"Accept-Encoding": "identity"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._list_s = list_s

    async def list(self) -> Listing:
        body = bytearray()
        try:
            async with self.client.stream(
                "GET", f"{self._base}/manifest", headers=self._headers, timeout=httpx.Timeout(self._list_s)
            ) as response:
                async for data in response.aiter_raw():
                    body += data
                    if len(body) > MAX_MANIFEST_BYTES:
                        raise self._broken()
        except httpx.TimeoutException as exc:
            raise unreachable(self.label, "does not answer in time") from exc
        except httpx.HTTPError as exc:
            raise unreachable(self.label, "cannot be reached") from exc
        if response.status_code != 200:
            raise self.refusal(response, bytes(body))
        try:
            info = msgspec.json.decode(body, type=ModelInfo)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise self._broken() from exc
        if info.model != self._model or any(
            file.sha256 is None or not _is_sha256(file.sha256) or not 0 <= file.size < 2**53
            for file in info.file_list
        ):
            raise self._broken()
        files = [RemoteFile(path=file.path, size=file.size, sha256=file.sha256) for file in info.file_list]
        return Listing(revision=info.revision, files=files)

    def _broken(self) -> RbeeError:
        return Unavailable(
            f"{self.label} gave a list of files that cannot be used.",
            code="peer_protocol_error",
            retryable=False,
        )

    def address(self, path: str) -> tuple[str, Mapping[str, str]]:
        return f"{self._base}/files/{quote(path)}", self._headers

    def refusal(self, response: httpx.Response, body: bytes = b"") -> RbeeError | Retryable:
        status = response.status_code
        error = Unavailable(f"{self.label} fails ({status}).", code="peer_unavailable")
        if status in RETRY_STATUS:
            wait = retry_after_s(response.headers.get("Retry-After"))
            return Retryable(f"{self.label} is not ready ({_code(body) or status})", error, wait)
        if status == 404:
            return NotFound(f"{self.label} has no {self._model} any more.", code="model_not_found")
        if status in (401, 403):
            return Unauthorized(
                f"{self.label} does not accept this hive's token. Give all of the cluster the same one.",
                code="peer_refused",
            )
        return error


def peer_client(patience: Patience) -> httpx.AsyncClient:
    """Make the client that fetches from other hives; it goes through no proxy and follows no redirect."""
    return httpx.AsyncClient(
        follow_redirects=False,
        trust_env=False,
        timeout=httpx.Timeout(patience.read_s, connect=patience.connect_s, pool=None),
        limits=httpx.Limits(max_connections=None),
    )


def _code(body: bytes) -> str | None:
    try:
        return msgspec.json.decode(body, type=ErrorBody).code
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
