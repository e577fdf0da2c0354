"""The model hub as a source: what huggingface_hub lists, and what each of its refusals means.

The client is given its endpoint and token as arguments; neither a token that somebody has stored in his home
nor the process's environment decides. It is imported when it is first needed, which takes half a second.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import httpx
from msgspec import Struct

from rbee_contracts.errors import Forbidden, InvalidRequest, NotFound, RbeeError, Unavailable
from rbee_hive import VERSION
from rbee_hive.models.fetch import RETRY_STATUS, retry_after_s
from rbee_hive.models.names import ModelName
from rbee_hive.models.source import Listing, Patience, RemoteFile, Retryable, unreachable

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

DEFAULT_ENDPOINT = "https://huggingface.co"
LIBRARY = "rbee"
LABEL = "the hub"

_is_endpoint = re.compile(r"https?://[^/?#\s@]+(/[^?#\s]*)?\Z").match
_is_sha256 = re.compile(r"[0-9a-f]{64}\Z").match
_is_sha1 = re.compile(r"[0-9a-f]{40}\Z").match


class UnusableHub(ValueError):
    """A setting of the hub that cannot be used; one line that says which."""


class HubAccess(Struct, frozen=True, kw_only=True):
    """Where the hub is, and who asks."""

    endpoint: str = DEFAULT_ENDPOINT
    token: str | None = None
    patience: Patience = Patience()

    def __repr__(self) -> str:
        return f"HubAccess(endpoint={self.endpoint!r}, token={'…' if self.token else None})"


def read_hub_access(
    environ: Mapping[str, str], *, endpoint: str | None = None, token_file: Path | None = None
) -> HubAccess:
    """Read `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_DOWNLOAD_TIMEOUT` and `HF_HUB_ETAG_TIMEOUT` (seconds).

    Args:
        endpoint: the configuration's, before that of the environment.
        token_file: likewise.

    Raises:
        UnusableHub: one of them cannot be used.
    """
    endpoint = (endpoint or environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).strip().rstrip("/")
    if not _is_endpoint(endpoint):
        raise UnusableHub("the hub's endpoint (HF_ENDPOINT) is not of the form https://HOST")
    token = environ.get("HF_TOKEN", "").strip() or None
    if token_file is not None:
        try:
            token = token_file.read_text().strip() or None
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
            raise UnusableHub(f"the hub's token file {token_file} cannot be read: {reason}") from exc
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise UnusableHub("the hub's token (HF_TOKEN) has characters that no token has")
    standard = Patience()
    return HubAccess(
        endpoint=endpoint,
        token=token,
        patience=Patience(
            read_s=_seconds(environ, "HF_HUB_DOWNLOAD_TIMEOUT", standard.read_s),
            list_s=_seconds(environ, "HF_HUB_ETAG_TIMEOUT", standard.list_s),
        ),
    )


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 86400:
        raise UnusableHub(f"{name} is not a number of seconds")
    return value


class HubSource:
    """Lists and addresses one model's files on the hub."""

    kind = "hub"
    label = LABEL

    def __init__(self, config: HubAccess, name: ModelName, client: httpx.AsyncClient) -> None:
        self.client = client
        self._config = config
        self._name = name
        self._commit: str | None = None

    async def list(self) -> Listing:
        with anyio.move_on_after(self._config.patience.list_s + 1):
            return await anyio.to_thread.run_sync(self._list, abandon_on_cancel=True)
        raise unreachable(LABEL, "does not answer in time")

    def _list(self) -> Listing:
        """Ask for everything in one request, whose timeout can be set; a walk of the tree has none."""
        import httpx2
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        # With it the client also asks the public hub, whatever the endpoint, who it is that runs it.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        api = HfApi(
            endpoint=self._config.endpoint,
            token=self._config.token or False,
            library_name=LIBRARY,
            library_version=VERSION,
        )
        try:
            info = api.model_info(
                self._name.repo,
                revision=self._name.revision,
                files_metadata=True,
                timeout=self._config.patience.list_s,
            )
        except OfflineModeIsEnabled as exc:
            raise Unavailable(
                "The hub may not be asked: HF_HUB_OFFLINE is set where the hive was started.",
                code="hub_offline",
                retryable=False,
            ) from exc
        except HFValidationError as exc:
            raise NotFound(f"{self._name.repo} cannot be on the hub: {exc}", code="model_not_found") from exc
        except HfHubHTTPError as exc:
            outcome = self._explain(
                exc.response.status_code,
                exc.response.headers.get("X-Error-Code"),
                exc.response.headers.get("Retry-After"),
            )
            raise outcome from exc
        except (httpx2.TransportError, OSError) as exc:
            raise unreachable(LABEL, _reason(exc)) from exc
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as exc:
            raise _not_a_hub(self._config.endpoint) from exc
        if info.sha is None or not _is_sha1(info.sha) or info.siblings is None:
            raise _not_a_hub(self._config.endpoint)
        self._commit = info.sha
        return Listing(revision=info.sha, files=[self._file(sibling) for sibling in info.siblings])

    def _file(self, sibling: "RepoSibling") -> RemoteFile:
        lfs = sibling.lfs
        sha256 = lfs.sha256 if lfs is not None else None
        size = lfs.size if lfs is not None else sibling.size
        is_known = _is_sha256(sha256 or "") or (sha256 is None and _is_sha1(sibling.blob_id or ""))
        if not is_known or not isinstance(size, int) or not 0 <= size < 2**53:
            raise _not_a_hub(self._config.endpoint)
        return RemoteFile(
            path=str(sibling.rfilename),
            size=size,
            sha256=sha256,
            git_sha1=sibling.blob_id if sha256 is None else None,
        )

    def address(self, path: str) -> tuple[str, Mapping[str, str]]:
        """Give the URL at the commit that was listed. The headers carry the token to the hub only."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self._name.repo, path, revision=self._commit, endpoint=self._config.endpoint)
        headers = {"User-Agent": f"{LIBRARY}/{VERSION}"}
        if self._config.token is not None:
            headers["Authorization"] = f"Bearer {self._config.token}"
        return url, headers

    def refusal(self, response: httpx.Response) -> RbeeError | Retryable:
        # What has redirected us has let us in: its address has expired by now, and a new one will do.
        if response.history and response.status_code in (401, 403, 404, 410):
            return unreachable(LABEL, f"sent to an address that answers {response.status_code}")
        return self._explain(
            response.status_code,
            response.headers.get("X-Error-Code"),
            response.headers.get("Retry-After"),
        )

    def _explain(self, status: int, code: str | None, retry_after: str | None) -> RbeeError | Retryable:
        repo = self._name.repo
        who = "The token in HF_TOKEN" if self._config.token else "A hive without HF_TOKEN"
        if code == "RevisionNotFound":
            return NotFound(
                f"The hub has {repo}, and no revision {self._name.revision or 'main'!r} of it. "
                "Give a branch, a tag or a commit that it has.",
                code="revision_not_found",
                title="Revision not found",
            )
        if status in (401, 403) and code == "GatedRepo":
            return Forbidden(
                f"{repo} is gated, and {who[0].lower() + who[1:]} may not read it. Accept its licence on the "
                "hub, set HF_TOKEN to a token of that account where the hive is started, and restart it.",
                code="hub_access_denied",
            )
        if status == 404 or (status == 401 and code == "RepoNotFound"):
            return NotFound(
                f"The hub knows no model {repo!r}, or it is private. Check its name; for a private one, set "
                "HF_TOKEN where the hive is started, and restart the hive.",
                code="model_not_found",
                title="Model not found",
            )
        if status in (401, 403):
            return Forbidden(
                f"The hub refuses {repo} ({status}). {who} may not read it: set HF_TOKEN to one that may, "
                "or accept the model's licence on the hub, and restart the hive.",
                code="hub_access_denied",
            )
        if status == 429:
            wait = retry_after_s(retry_after)
            error = Unavailable(
                "The hub answers too many requests (429)"
                + (f" and asks to wait for {wait:.0f} s" if wait is not None else "")
                + ". Try again later; with HF_TOKEN set it allows more.",
                code="hub_rate_limited",
            )
            return Retryable("the hub asks to slow down (429)", error, wait)
        error = Unavailable(
            f"The hub fails ({status}). Try again later.", code="hub_unavailable", title="Hub unavailable"
        )
        if status in RETRY_STATUS:
            return Retryable(f"the hub fails ({status})", error, retry_after_s(retry_after))
        if status >= 500:
            return Retryable(f"the hub fails ({status})", error)
        return InvalidRequest(f"The hub refuses {repo} ({status}).", code="hub_refused")


def hub_client(patience: Patience) -> httpx.AsyncClient:
    """Make the client that fetches from the hub and from where it redirects to.

    httpx drops the Authorization header when a redirect leads to another origin.
    """
    return httpx.AsyncClient(
        follow_redirects=True,
        timeout=httpx.Timeout(patience.read_s, connect=patience.connect_s, pool=None),
        limits=httpx.Limits(max_connections=None),
    )


def _not_a_hub(endpoint: str) -> RbeeError:
    return Unavailable(
        f"What answers at {endpoint} is no model hub, or one that lists no checksums. Check HF_ENDPOINT.",
        code="hub_protocol_error",
        retryable=False,
    )


def _reason(exc: Exception) -> str:
    name = type(exc).__name__
    return "does not answer in time" if "Timeout" in name else f"cannot be reached ({name})"
