"""A model hub on this machine, as far as huggingface_hub asks for one, that fails on command.

Two servers with one state: the hub itself, which lists models and redirects to the bytes of large files, and
the content network that it redirects to, which is another origin. Written against the real client, which
`tests/faults/test_download_faults.py` runs against it.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".gguf", ".bin")
"""Files of these names lie in large file storage: known by SHA-256, and fetched from the content network."""

PIECE_BYTES = 64 * 1024

Kind = Literal["status", "hold", "reset", "truncate", "corrupt", "longer", "new_etag", "no_ranges"]


@dataclass
class Fault:
    """What goes wrong with requests whose path has `path` in it, `times` times (None: always), after `skip`.

    `after` counts bytes of the body. `hold` stops there until the hub is told to go on.
    """

    kind: Kind
    path: str = ""
    times: int | None = None
    skip: int = 0
    after: int = 0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    go_on: threading.Event | None = None
    """Set once the hub is told to go on after the request came."""


@dataclass
class Asked:
    """One request that came, and how much of a body it got."""

    server: str
    method: str
    path: str
    headers: Mapping[str, str]
    status: int = 0
    sent: int = 0


@dataclass
class Repo:
    """One model: its files at one commit, and the names of that commit."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None
    is_gated: bool = False
    listed: list[dict[str, Any]] | None = None
    """What is listed instead of the files, for names that no honest hub has."""

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for path in sorted(self.files):
            digest.update(f"{path}\0{_sha256(self.files[path])}\n".encode())
        return digest.hexdigest()


class Hub:
    """The hub's state and its two servers."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.pages: dict[str, bytes] = {}
        """Further paths of the hub and what they give, for tests in which it plays another service."""
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.held = 0
        """Answers that were stopped in their middle so far."""
        self._lock = threading.Lock()
        self._go_on = threading.Event()
        self._servers = {name: _Server(name, self) for name in ("hub", "cdn")}
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.02,), name=name)
            for name, server in self._servers.items()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def url(self) -> str:
        return self._servers["hub"].url

    @property
    def cdn_url(self) -> str:
        return self._servers["cdn"].url

    def close(self) -> None:
        """Stop both servers and every answer that is still being given."""
        self.go_on()
        for server in self._servers.values():
            server.shutdown()
            server.close_connections()
            server.server_close()
        for thread in self._threads:
            thread.join(10)

    def add(self, model: str, source: Path | Mapping[str, bytes], **options: Any) -> Repo:
        """Have a model: the files of a folder, or these."""
        if isinstance(source, Path):
            found = (path for path in sorted(source.rglob("*")) if path.is_file())
            files = {path.relative_to(source).as_posix(): path.read_bytes() for path in found}
        else:
            files = dict(source)
        self.repos[model] = Repo(files, **options)
        return self.repos[model]

    def fail(self, kind: Kind, path: str = "", **options: Any) -> Fault:
        """Let something go wrong from now on."""
        fault = Fault(kind, path, **options)
        with self._lock:
            self.faults.append(fault)
        return fault

    def heal(self) -> None:
        """Let nothing go wrong any more; what is held goes on."""
        with self._lock:
            self.faults.clear()
        self.go_on()

    def go_on(self) -> None:
        """Let every body that is held go on, and those of which it is decided already."""
        with self._lock:
            self._go_on.set()
            self._go_on = threading.Event()

    def hold(self, fault: Fault) -> None:
        """Keep one answer where it is until the hub is told to go on, or closes."""
        with self._lock:
            self.held += 1
        assert fault.go_on is not None
        fault.go_on.wait(120)

    def take(self, kinds: tuple[Kind, ...], path: str) -> Fault | None:
        """Give what goes wrong with this request, and count it."""
        with self._lock:
            for fault in self.faults:
                if fault.kind in kinds and fault.path in path and fault.times != 0:
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    if fault.times is not None:
                        fault.times -= 1
                    return replace(fault, go_on=self._go_on)
        return None

    def bodies(self, path: str) -> list[Asked]:
        """Give the requests for the bytes of files whose path, or content, has `path` in it."""
        return [
            asked
            for asked in self.asked
            if asked.method == "GET" and path in asked.path and asked.status in (200, 206)
        ]

    def content_path(self, model: str, path: str) -> str:
        """Give the path under which the content network has a large file."""
        return f"/blobs/{_sha256(self.repos[model].files[path])}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub for a test."""
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, name: str, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.hub = hub
        self._connections: set[socket.socket] = set()
        self._threads_alive: set[threading.Thread] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        thread = threading.current_thread()
        self._connections.add(request)
        self._threads_alive.add(thread)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.discard(request)
            self._threads_alive.discard(thread)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads_alive):
            thread.join(10)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that leave are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def _hub(self) -> Hub:
        return cast(_Server, self.server).hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        name = cast(_Server, self.server).name
        self._asked = Asked(name, self.command, path, {k.lower(): v for k, v in self.headers.items()})
        self._hub.asked.append(self._asked)
        fault = self._hub.take(("status",), path)
        if fault is not None:
            self._fail(fault.status, headers=fault.headers)
            return
        if name == "cdn":
            self._content(path)
            return
        page = self._hub.pages.get(path)
        if page is not None:
            self._file(page, f'"{_sha256(page)}"', {})
            return
        for pattern, handle in self._routes():
            match = re.fullmatch(pattern, path)
            if match is not None:
                handle(*match.groups(), parse_qs(url.query))
                return
        self._fail(404)

    def _routes(self) -> list[tuple[str, Callable[..., None]]]:
        return [
            (r"/api/models/(.+)/revision/([^/]+)", self._info),
            (r"/api/models/(.+)/tree/([^/]+)", self._tree),
            (r"/api/models/(.+)", lambda model, query: self._info(model, "main", query)),
            (r"/(.+)/resolve/([^/]+)/(.+)", self._resolve),
        ]

    # --- the hub -----------------------------------------------------------------------------------------

    def _repo(self, model: str, revision: str) -> Repo | None:
        """Give the model at a revision; None when the request has been answered already."""
        repo = self._hub.repos.get(model)
        given = self.headers.get("Authorization", "")
        if repo is None or (repo.token is not None and given != f"Bearer {repo.token}" and not repo.is_gated):
            self._fail(404 if given else 401, "RepoNotFound")
        elif repo.is_gated and given != f"Bearer {repo.token}":
            self._fail(403 if given else 401, "GatedRepo")
        elif revision not in (*repo.revisions, repo.commit):
            self._fail(404, "RevisionNotFound")
        else:
            return repo
        return None

    def _info(self, model: str, revision: str, query: Mapping[str, list[str]]) -> None:
        repo = self._repo(model, revision)
        if repo is None:
            return
        siblings = repo.listed
        if siblings is None:
            siblings = [_sibling(path, data) for path, data in sorted(repo.files.items())]
        if "blobs" not in query:
            siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
        self._json(
            {
                "_id": "0" * 24,
                "id": model,
                "modelId": model,
                "sha": repo.commit,
                "private": repo.token is not None,
                "gated": repo.is_gated,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "siblings": siblings,
            }
        )

    def _tree(self, model: str, revision: str, _: Mapping[str, list[str]]) -> None:
        repo = self._repo(model, revision)
        if repo is None:
            return
        found = []
        for path, data in sorted(repo.files.items()):
            entry = {"type": "file", "oid": _git_sha1(data), "size": len(data), "path": path}
            if path.endswith(LARGE_SUFFIXES):
                entry["lfs"] = {
                    "oid": _sha256(data),
                    "size": len(data),
                    "pointerSize": 134,
                }
            found.append(entry)
        self._json(found)

    def _resolve(self, model: str, revision: str, path: str, _: Mapping[str, list[str]]) -> None:
        repo = self._repo(model, revision)
        if repo is None:
            return
        data = repo.files.get(path)
        headers = {"X-Repo-Commit": repo.commit}
        if data is None:
            self._fail(404, "EntryNotFound", headers)
        elif path.endswith(LARGE_SUFFIXES):
            sha256 = _sha256(data)
            headers |= {
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"{self._hub.cdn_url}/blobs/{sha256}?signed=1&name={quote(path)}",
                "Content-Length": "0",
            }
            self._start(302, headers)
        else:
            self._file(data, f'"{_git_sha1(data)}"', headers)

    # --- the content network -----------------------------------------------------------------------------

    def _content(self, path: str) -> None:
        for repo in self._hub.repos.values():
            for data in repo.files.values():
                if path == f"/blobs/{_sha256(data)}":
                    self._file(data, f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"', {})
                    return
        self._fail(404)

    # --- answers -----------------------------------------------------------------------------------------

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._start(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self._send(body)

    def _fail(self, status: int, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        more = dict(headers or {})
        if code:
            more |= {"X-Error-Code": code, "X-Error-Message": code}
        body = b'{"error":"no"}'
        self._start(status, more | {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self._send(body)

    def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self._asked.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _file(self, data: bytes, etag: str, headers: Mapping[str, str]) -> None:
        """Send a file, or the range of it that is asked for; with what goes wrong."""
        path = self._asked.path
        take = self._hub.take
        if self.command == "GET":
            if take(("new_etag",), path) is not None:
                etag = f'"new-{etag.strip(chr(34))}"'
            if take(("corrupt",), path) is not None:
                data = data[:-1] + bytes([data[-1] ^ 1])
            if take(("longer",), path) is not None:
                data += b"more"
        start, end, status = 0, len(data), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        is_same = self.headers.get("If-Range") in (None, etag)
        if asked is not None and is_same and take(("no_ranges",), path) is None:
            start = int(asked[1])
            end = min(int(asked[2]) + 1, len(data)) if asked[2] else len(data)
            status = 206
            if start >= len(data):
                self._fail(416, headers={"Content-Range": f"bytes */{len(data)}"})
                return
        more = {**headers, "ETag": etag, "Accept-Ranges": "bytes", "Content-Length": str(end - start)}
        if status == 206:
            more["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        fault = take(("hold", "reset", "truncate"), path) if self.command == "GET" else None
        self._start(status, more)
        if fault is None:
            self._send(data[start:end])
            return
        cut = min(start + fault.after, end)
        self._send(data[start:cut])
        if fault.kind == "hold":
            self._hub.hold(fault)
            self._send(data[cut:end])
        else:
            if fault.kind == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

    def _send(self, body: bytes) -> None:
        if self.command == "HEAD":
            return
        for begin in range(0, len(body), PIECE_BYTES):
            piece = body[begin : begin + PIECE_BYTES]
            # Counted before: who has got the last piece looks at once how much was sent.
            self._asked.sent += len(piece)
            self.wfile.write(piece)


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _git_sha1(data)}
    if path.endswith(LARGE_SUFFIXES):
        sha256 = _sha256(data)
        found["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
    return found


@lru_cache(maxsize=64)
def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=64)
def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
