"""What `hive_check` makes of what it finds."""

import socket
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from rbee_contracts.errors import Unauthorized, Unavailable
from rbee_contracts.nodes import Device, Finding, ServiceInfo
from rbee_hive.check import facts as looks
from rbee_hive.check.facts import (
    DiskFacts,
    EngineFacts,
    ask_hub,
    disk_facts,
    engine_facts,
    free_ports,
    shm_size,
)
from rbee_hive.check.findings import (
    of_clock,
    of_devices,
    of_driver,
    of_engine,
    of_hub,
    of_models,
    of_open_files,
    of_ports,
    of_queen,
    of_shm,
    of_state,
)
from rbee_hive.config import PortRange

GIB = 1 << 30
CUDA = EngineFacts(vllm="0.32.0", torch="2.13.0", torch_cuda="12.8")
CPU = EngineFacts(vllm="0.32.0", torch="2.13.0+cpu", torch_cuda=None)
NONE = EngineFacts(vllm=None, torch=None, torch_cuda=None)
HERE = Path("/m")


def driver(facts: EngineFacts, version: str | None = "570", **changes: Any) -> Iterable[Finding]:
    known: dict[str, Any] = {"cuda": "12.8", "why_none": "no library", "gpus": 1, "is_sim": False}
    return of_driver(facts, driver=version, **(known | changes))


def gpu(used: int = 0, **facts: Any) -> list[Device]:
    return [Device(kind="cuda", index=0, name="GPU", uuid="GPU-1", memory_total=80 * GIB,
                   memory_used=used, **facts)]  # fmt: skip


def folder(free: int | None = 100 * GIB, *, exists: bool = True, is_writable: bool = True) -> DiskFacts:
    total = None if free is None else 200 * GIB
    return DiskFacts(path=HERE, exists=exists, is_writable=is_writable, free=free, total=total)


def service(name: Any) -> ServiceInfo:
    return ServiceInfo(name=name, id="x", version="1", boot="b", uptime_s=1)


CASES: dict[str, tuple[Callable[[], Iterable[Finding]], list[str], str]] = {
    "engine": (lambda: of_engine(CPU, is_sim=False), ["ok"], "vLLM 0.32.0"),
    "no engine": (lambda: of_engine(NONE, is_sim=False), ["failed"], "make setup ENGINE"),
    "sim": (lambda: of_engine(NONE, is_sim=True), ["ok"], "not needed"),
    "driver fits": (lambda: driver(CUDA), ["ok"], "CUDA up to 12.8; 1 GPUs"),
    "no driver, CPU engine": (lambda: driver(CPU, None), ["ok"], "no library"),
    "no driver, CUDA engine": (lambda: driver(CUDA, None), ["failed"], "cannot run on a CPU"),
    "no driver, sim": (lambda: driver(CUDA, None, is_sim=True), ["ok"], "the only device"),
    "driver, CPU engine": (lambda: driver(CPU), ["failed"], "leaves them idle"),
    "driver, no GPU used": (lambda: driver(CPU, gpus=0), ["ok"], "0 GPUs"),
    "driver a little old": (lambda: driver(CUDA, cuda="12.4"), ["warning"], "Install a driver"),
    "driver too old": (lambda: driver(CUDA, cuda="11.8"), ["failed"], "Install a driver"),
    "driver newer": (lambda: driver(CUDA, cuda="13.0"), ["ok"], "13.0"),
    "driver hangs": (lambda: of_devices(None), ["failed"], "hangs"),
    "GPU well": (lambda: of_devices(gpu()), ["ok"], "80.0 GiB of 80.0 GiB are free"),
    "GPU full": (lambda: of_devices(gpu(79 * GIB)), ["warning"], "rbee worker list"),
    "GPU failed": (
        lambda: of_devices(gpu(health="failed", issues=["Xid 79."])),
        ["failed", "ok"],
        "--ignore-device GPU-1",
    ),
    "GPU degraded": (
        lambda: of_devices(gpu(health="degraded", issues=["Hot."])), ["warning", "ok"], "is degraded: Hot.",
    ),
    "GPU without memory": (
        lambda: of_devices([Device(kind="cuda", index=0, name="GPU")]), ["ok"], "does not tell",
    ),
    "models": (lambda: of_models(folder(), []), ["ok"], "100.0 GiB of 200.0 GiB"),
    "models, low": (lambda: of_models(folder(5 * GIB), []), ["warning"], "rbee model delete"),
    "models, full": (lambda: of_models(folder(5), []), ["failed"], "rbee model delete"),
    "models, to be made": (lambda: of_models(folder(None, exists=False), []), ["ok"], "first download"),
    "models, not ours": (lambda: of_models(folder(is_writable=False), []), ["failed"], "--models-dir"),
    "models, cannot be made": (
        lambda: of_models(folder(None, exists=False, is_writable=False), []), ["failed"], "cannot be made",
    ),
    "models, hanging": (lambda: of_models(None, []), ["failed"], "its disk hangs"),
    "model root gone": (
        lambda: of_models(folder(), [(HERE, folder(exists=False)), (HERE, None), (HERE, folder())]),
        ["ok", "warning", "failed"],
        "model_roots",
    ),
    "state": (lambda: of_state(folder()), ["ok"], "/m"),
    "state, not ours": (lambda: of_state(folder(is_writable=False)), ["failed"], "--state-dir"),
    "state, hanging": (lambda: of_state(None), ["failed"], "hangs"),
    "ports": (lambda: of_ports(PortRange(), 700), ["ok"], "9300 to 9999"),
    "few ports": (lambda: of_ports(PortRange(), 2), ["warning"], "--worker-first-port"),
    "no port": (lambda: of_ports(PortRange(), 0), ["failed"], "--worker-first-port"),
    "no queen": (lambda: of_queen(None, None, None), ["ok"], "on its own"),
    "queen": (lambda: of_queen("http://q", service("queen"), None), ["ok"], "answers"),
    "queen is a hive": (lambda: of_queen("http://q", service("hive"), None), ["failed"], "A hive answers"),
    "queen away": (lambda: of_queen("http://q", None, Unavailable("It is gone.")), ["failed"], "--queen-url"),
    "queen refuses": (lambda: of_queen("http://q", None, Unauthorized("no")), ["failed"], "RBEE_TOKEN"),
    "hub": (lambda: of_hub("http://h", None), ["ok"], "answers"),
    "hub away": (lambda: of_hub("http://h", "it hangs"), ["warning"], "--hub-endpoint"),
    "files": (lambda: of_open_files(5000, 4608), ["ok"], "5000"),
    "any number of files": (lambda: of_open_files(None, 4608), ["ok"], "any number"),
    "few files": (lambda: of_open_files(1024, 4608), ["warning"], "ulimit -n"),
    "shm": (lambda: of_shm(8 * GIB), ["ok"], "8.0 GiB"),
    "small shm": (lambda: of_shm(64 << 20), ["warning"], "--shm-size"),
    "no shm": (lambda: of_shm(None), ["warning"], "tmpfs"),
    "clock": (lambda: of_clock(datetime(2026, 1, 2, tzinfo=UTC)), ["ok"], "2026-01-02T00:00:00+00:00"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_a_finding_says_how_it_is_and_what_to_do(case: str) -> None:
    judge, statuses, words = CASES[case]
    findings = list(judge())

    assert [finding.status for finding in findings] == statuses
    assert words in " ".join(f"{finding.message} {finding.remedy or ''}" for finding in findings)
    assert all(finding.message.endswith(".") for finding in findings)
    assert all((finding.remedy is None) == (finding.status == "ok") for finding in findings)


@pytest.mark.parametrize(
    ("version", "written", "cuda"),
    [
        ("2.13.0+cu128", None, "12.8"),
        ("2.13.0+cu130", None, "13.0"),
        ("2.13.0+cpu", None, None),
        ("2.14.0", "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "13.0"),
        ("2.14.0", "cuda: Optional[str] = None\n", None),
        ("2.14.0", None, None),
    ],
    ids=["named", "named-13", "cpu", "written", "written-none", "nowhere"],
)
def test_the_cuda_that_torch_is_built_for_is_read_and_not_imported(
    version: str, written: str | None, cuda: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    if written is not None:
        (tmp_path / "torch/version.py").write_text(written)

    class Distribution:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(metadata, "version", lambda name: {"torch": version, "vllm": "1"}[name])
    monkeypatch.setattr(metadata, "distribution", lambda _: Distribution())

    assert engine_facts().torch_cuda == cuda


def test_what_is_installed_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)

    assert engine_facts() == NONE


def test_folders(tmp_path: Path) -> None:
    there = disk_facts(tmp_path)
    to_be_made = disk_facts(tmp_path / "a/b")
    nowhere = disk_facts(Path("/proc/none"))

    assert (there.exists, there.is_writable) == (True, True)
    assert there.free is not None
    assert (to_be_made.exists, to_be_made.is_writable, to_be_made.free) == (False, True, None)
    assert (nowhere.exists, nowhere.is_writable) == (False, False)
    assert list(tmp_path.iterdir()) == []


def test_ports_that_are_taken_do_not_count() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        assert free_ports(PortRange(first=port, last=port)) == 0


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    assert shm_size(tmp_path / "none") is None
    assert shm_size(tmp_path)


@pytest.mark.parametrize(("status", "expected"), [(200, None), (404, None), (503, "it answers 503")])
async def test_a_hub_that_answers(status: int, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "HUB_S", 60.0)

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return None

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            assert await ask_hub(f"http://127.0.0.1:{server.server_port}") == expected
        finally:
            server.shutdown()
            thread.join()


async def test_a_hub_that_refuses_and_one_that_is_silent() -> None:
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        closed.bind(("127.0.0.1", 0))

        assert await ask_hub(f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert await ask_hub(f"http://127.0.0.1:{silent.getsockname()[1]}")
