"""Downloads of a real hive: a hub that fails, a disk that fills, a hive that is killed, another hive."""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from hub_server import Hub, Kind, running_hub
from rbee_processes import MODELS, Cluster, Service, kill_marked, marked_processes, stream, until

pytestmark = pytest.mark.timeout(400)

WEIGHTS = "model.safetensors"
TINY = MODELS / "rbee-tiny"

Events = list[dict[str, Any]]


class LoneHive:
    """A hive without a queen, that can be killed and started again on its folders."""

    def __init__(self, folder: Path, models: Path | None = None) -> None:
        self.folder = folder
        self.models = models or folder / "models"
        self._marker = f"{os.getpid()}-{folder.name}-{time.monotonic_ns()}"
        self._starts = 0
        self.start()

    def start(self) -> None:
        self._starts += 1
        self.service = Service(
            "rbee-hive",
            [
                *("--port", "0", "--hive-id", "box1", "--queen-url", "none", "--worker-engine", "sim"),
                *("--models-dir", str(self.models), "--state-dir", str(self.folder / "state")),
            ],
            self.folder / f"hive{self._starts}.log",
            self._marker,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.service.terminate()
            until(lambda: not marked_processes(self._marker), "no process is left")
        finally:
            kill_marked(self._marker)

    def submit(self, operation: str, model: str | None = None, **fields: Any) -> str:
        body = {"operation": operation, **fields} | ({"model": model} if model is not None else {})
        answer = httpx.post(
            f"{self.service.url}/v1/jobs", json=body, headers={"Prefer": "respond-async"}, timeout=30
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job_id"])

    def events(self, operation: str, model: str | None = None, **fields: Any) -> Events:
        return self.read(self.submit(operation, model, **fields))

    def read(self, job_id: str) -> Events:
        with stream(self.service.url, job_id) as frames:
            return [event for _, event in frames]

    def run(self, operation: str, model: str | None = None, **fields: Any) -> Any:
        last = self.events(operation, model, **fields)[-1]
        assert last["action"] == "execute_complete", last
        return last["data"]

    def error(self, operation: str, model: str, **fields: Any) -> dict[str, Any]:
        """Run what must fail; give its `error` event, of which there is one."""
        events = self.events(operation, model, **fields)
        assert [event["action"] for event in events[-2:]] == ["error", "execute_error"], events[-2:]
        (error,) = [event for event in events if event["action"] == "error"]
        return error

    def cancel(self, job_id: str) -> None:
        assert httpx.delete(f"{self.service.url}/v1/jobs/{job_id}", timeout=30).status_code == 200

    def listed(self) -> list[str]:
        return [info["model"] for info in self.run("model_list")["models"]]

    def partial_size(self, model: str = "org/tiny") -> int:
        return largest(self._staging(model).glob("sha256-*.part"))

    def has_left(self, model: str = "org/tiny") -> bool:
        """Say whether no transfer works on a model's partial files, which are whole then."""
        with suppress(FileNotFoundError), (self._staging(model) / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _staging(self, model: str) -> Path:
        return self.models / ".downloads" / model.replace("/", "%2F")


def largest(paths: Iterable[Path]) -> int:
    """Give the size of the largest of some files; one that is moved away meanwhile has none."""
    found = 0
    for path in paths:
        with suppress(FileNotFoundError):
            found = max(found, path.stat().st_size)
    return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # What the hub holds back is waited for, however long a test needs meanwhile.
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setenv(name, "120")
    with running_hub() as hub:
        hub.add("org/tiny", TINY)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def hive(hub: Hub, tmp_path: Path) -> Iterator[LoneHive]:
    with LoneHive(tmp_path) as hive:
        yield hive


def sums_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def progress_of(events: Events) -> Events:
    return [event["data"] for event in events if event["action"] == "model_download_progress"]


# --- the hub of these tests ------------------------------------------------------------------------------


def test_the_genuine_client_downloads_from_the_hub_of_these_tests(hub: Hub, tmp_path: Path) -> None:
    script = (
        "import sys; from huggingface_hub import HfApi, snapshot_download\n"
        "print(snapshot_download('org/tiny', local_dir=sys.argv[1], token='hf_right'))\n"
        "print(HfApi().model_info('org/tiny', files_metadata=True).siblings[0])\n"
    )
    hub.repos["org/tiny"].token = "hf_right"
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_right"}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "there"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, done.stderr
    there = {path: value for path, value in sums_of(tmp_path / "there").items() if not path.startswith(".")}
    assert there == sums_of(TINY)
    assert all("authorization" not in asked.headers for asked in hub.asked if asked.server == "cdn")


# --- a download ------------------------------------------------------------------------------------------


def test_a_download_is_narrated_listed_and_deleted(hive: LoneHive) -> None:
    events = hive.events("model_download", "org/tiny")

    actions = [event["action"] for event in events]
    assert actions[:2] == ["execute", "model_download_start"]
    assert actions[-2:] == ["model_download_complete", "execute_complete"]
    last = progress_of(events)[-1]
    assert last["bytes_done"] == last["bytes_total"] == sum(p.stat().st_size for p in TINY.iterdir())
    assert last["files_done"] == last["files_total"] == len(list(TINY.iterdir()))
    assert sums_of(hive.models / "org/tiny") == sums_of(TINY)

    info = hive.run("model_get", "org/tiny")
    assert {file["path"]: file["sha256"] for file in info["file_list"]} == sums_of(TINY)
    assert events[-1]["data"]["revision"] == info["revision"]
    deleted = hive.run("model_delete", "org/tiny")
    assert deleted["freed"] == last["bytes_total"]
    assert hive.listed() == []
    assert list(hive.models.iterdir()) == []


def test_progress_comes_while_bytes_come_and_names_the_files(hive: LoneHive, hub: Hub) -> None:
    hub.fail("hold", hub.content_path("org/tiny", WEIGHTS), after=1_200_000, times=1)
    job_id = hive.submit("model_download", "org/tiny")
    with stream(hive.service.url, job_id) as frames:
        for _, event in frames:
            if event["action"] == "model_download_progress" and event["data"]["bytes_done"] > 1_000_000:
                break
        (current,) = [file for file in event["data"]["current"] if file["path"] == WEIGHTS]
        assert 1_000_000 < current["bytes_done"] < current["bytes_total"]
        assert hive.listed() == []
        hub.go_on()
        rest = [event for _, event in frames]

    assert rest[-1]["action"] == "execute_complete"
    assert hive.listed() == ["org/tiny"]


# --- a hub that fails ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("reset", {"after": 900_000, "times": 1}),
        ("truncate", {"after": 900_000, "times": 1}),
        ("status", {"status": 500, "times": 1}),
        ("status", {"status": 429, "times": 1, "headers": {"Retry-After": "1"}}),
        ("corrupt", {"times": 1}),
    ],
    ids=["reset", "truncated", "500", "429", "corrupted"],
)
def test_a_hub_that_fails_once_costs_no_more_than_time(
    hive: LoneHive, hub: Hub, kind: Kind, options: dict[str, Any]
) -> None:
    hub.fail(kind, hub.content_path("org/tiny", WEIGHTS), **options)

    hive.run("model_download", "org/tiny")

    assert sums_of(hive.models / "org/tiny") == sums_of(TINY)


def test_a_hub_that_stalls_is_taken_up_where_it_stopped(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail("hold", path, after=900_000, times=1)
    with LoneHive(tmp_path) as hive:
        events = hive.events("model_download", "org/tiny")

    assert events[-1]["action"] == "execute_complete"
    assert any(event["action"] == "model_download_retry" for event in events)
    assert (
        hub.bodies(path)[-1].headers["range"] == f"bytes=900000-{TINY.joinpath(WEIGHTS).stat().st_size - 1}"
    )


@pytest.mark.parametrize(
    ("status", "headers", "code", "words"),
    [
        (401, {}, "model_not_found", "HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, "hub_access_denied", "licence"),
        (404, {"X-Error-Code": "RepoNotFound"}, "model_not_found", "'org/tiny'"),
        (429, {"Retry-After": "600"}, "hub_rate_limited", "600 s"),
        (500, {}, "hub_unavailable", "Try again later"),
    ],
    ids=["401", "403", "404", "429", "500"],
)
def test_a_hub_that_refuses_is_one_error_that_says_what_to_do(
    hive: LoneHive, hub: Hub, status: int, headers: dict[str, str], code: str, words: str
) -> None:
    if status == 401:
        headers = {"X-Error-Code": "RepoNotFound"}
    hub.fail("status", "/api/", status=status, headers=headers)

    error = hive.error("model_download", "org/tiny")

    assert (error["code"], words in error["message"]) == (code, True)
    assert hive.listed() == []
    hub.heal()
    hive.run("model_download", "org/tiny")


def test_wrong_bytes_are_never_listed(hive: LoneHive, hub: Hub) -> None:
    """F43."""
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail("corrupt", path)

    error = hive.error("model_download", "org/tiny")

    assert error["code"] == "checksum_mismatch"
    assert len(hub.bodies(path)) == 2
    assert hive.listed() == []
    hub.heal()
    hive.run("model_download", "org/tiny")
    assert hive.listed() == ["org/tiny"]


@pytest.mark.parametrize(
    "path", ["../../evil", "/evil", "a\0b", "..\\evil", "x" * 300], ids=["up", "root", "nul", "back", "long"]
)
def test_a_hostile_file_name_touches_no_disk(hive: LoneHive, hub: Hub, path: str) -> None:
    """F45."""
    before = sorted(hive.folder.rglob("*"))
    hub.add("org/evil", TINY).listed = [
        {"rfilename": "config.json", "size": 2, "blobId": "0" * 40},
        {"rfilename": path, "size": 2, "blobId": "0" * 40},
    ]

    assert hive.error("model_download", "org/evil")["code"] == "unsafe_file_name"
    assert {path for path in hive.folder.rglob("*") if path not in before} == set()


@pytest.mark.parametrize("model", ["../up", "/etc", "a/b/c", "a\0b", "a@b@c", ".hidden", "x" * 300])
def test_a_hostile_model_id_is_refused_with_400(hive: LoneHive, model: str) -> None:
    for operation in ("model_download", "model_get", "model_delete"):
        body = {"operation": operation, "model": model}
        answer = httpx.post(f"{hive.service.url}/v1/jobs", json=body, timeout=30)

        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_field")


# --- several at once, cancelled, killed ------------------------------------------------------------------


def test_two_downloads_of_one_model_share_a_transfer_and_one_may_be_cancelled(
    hive: LoneHive, hub: Hub
) -> None:
    """F44."""
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail("hold", path, after=900_000, times=1)
    first = hive.submit("model_download", "org/tiny")
    until(lambda: hub.held, "the hub holds an answer")
    second = hive.submit("model_download", "org/tiny")
    with stream(hive.service.url, second) as frames:
        start = next(event for _, event in frames if event["action"] == "model_download_start")
        assert start["data"]["joined"] is True
        hive.cancel(first)
        assert hive.read(first)[-1]["action"] == "execute_cancelled"
        hub.go_on()
        rest = [event for _, event in frames]

    assert rest[-1]["action"] == "execute_complete"
    assert len(hub.bodies(path)) == 1


def test_a_cancelled_download_keeps_what_came_and_the_next_one_goes_on(hive: LoneHive, hub: Hub) -> None:
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail("hold", path, after=1_500_000, times=1)
    job_id = hive.submit("model_download", "org/tiny")
    until(hive.partial_size, "some of it lies on the disk")
    hive.cancel(job_id)
    until(hive.has_left, "the transfer has ended")
    kept = hive.partial_size()
    assert 0 < kept <= 1_500_000
    assert hive.listed() == []

    hive.run("model_download", "org/tiny")

    size = TINY.joinpath(WEIGHTS).stat().st_size
    assert hub.bodies(path)[1].headers["range"] == f"bytes={kept}-{size - 1}"
    assert sums_of(hive.models / "org/tiny") == sums_of(TINY)


def test_a_hive_killed_in_mid_download_goes_on_after_its_restart(hive: LoneHive, hub: Hub) -> None:
    path = hub.content_path("org/tiny", WEIGHTS)
    size = TINY.joinpath(WEIGHTS).stat().st_size
    hub.fail("hold", path, after=1_500_000, times=1)
    hive.submit("model_download", "org/tiny")
    until(hive.partial_size, "bytes lie on the disk")
    hive.service.kill()
    kept = hive.partial_size()
    hive.start()
    assert hive.listed() == []

    events = hive.events("model_download", "org/tiny")

    assert events[-1]["action"] == "execute_complete"
    assert hub.bodies(path)[-1].headers["range"] == f"bytes={kept}-{size - 1}"
    until(lambda: hub.bodies(path)[-1].sent == size - kept, "the hub has sent the rest, and no more")
    assert progress_of(events)[0]["bytes_done"] >= kept
    assert sums_of(hive.models / "org/tiny") == sums_of(TINY)
    assert [path.name for path in hive.models.iterdir()] == ["org"]


def test_a_download_asked_of_the_queen_goes_on_when_its_hive_was_killed(hub: Hub, tmp_path: Path) -> None:
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail("hold", path, after=1_500_000, times=1)
    with Cluster(tmp_path, engine="sim", models=tmp_path / "models") as cluster:
        operation = {"operation": "model_download", "model": "org/tiny", "hive_id": "box1"}
        job_id = cluster.submit(operation, Prefer="respond-async")
        parts = "models/.downloads/*/sha256-*.part"
        until(lambda: largest(tmp_path.glob(parts)), "bytes lie on the disk")
        cluster.hive.kill()
        cluster.restart_hive(cluster.hive.url.rpartition(":")[2])
        with stream(cluster.queen.url, job_id) as frames:
            events = [event for _, event in frames]

    assert events[-1]["action"] == "execute_complete", events[-1]
    assert "range" in hub.bodies(path)[-1].headers
    assert sums_of(tmp_path / "models/org/tiny") == sums_of(TINY)


def test_a_hive_stopped_in_mid_download_ends_the_job_and_goes_on_after_its_restart(
    hive: LoneHive, hub: Hub
) -> None:
    hub.fail("hold", hub.content_path("org/tiny", WEIGHTS), after=900_000, times=1)
    job_id = hive.submit("model_download", "org/tiny")
    with stream(hive.service.url, job_id) as frames:
        until(lambda: hub.held, "the hub holds an answer")
        hive.service.process.send_signal(signal.SIGTERM)
        last = [event for _, event in frames][-1]
    assert last["action"] in ("execute_error", "execute_cancelled")
    assert hive.service.terminate() == 0
    hive.start()

    hive.run("model_download", "org/tiny")
    assert hive.listed() == ["org/tiny"]


def test_a_model_that_is_being_downloaded_or_used_is_not_deleted(hive: LoneHive, hub: Hub) -> None:
    hub.fail("hold", hub.content_path("org/tiny", WEIGHTS), after=900_000, times=1)
    job_id = hive.submit("model_download", "org/tiny")
    until(lambda: hub.held, "the hub holds an answer")
    assert hive.error("model_delete", "org/tiny")["code"] == "download_running"
    hub.go_on()
    assert hive.read(job_id)[-1]["action"] == "execute_complete"

    worker = hive.run("worker_spawn", "org/tiny")["worker_id"]
    error = hive.error("model_delete", "org/tiny")
    assert (error["code"], worker in error["message"]) == ("model_in_use", True)
    assert hive.run("model_get", "org/tiny")["used_by"] == [worker]
    hive.run("worker_stop", worker_id=worker, grace_s=5)
    hive.run("model_delete", "org/tiny")
    assert hive.listed() == []


# --- a full disk -----------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a disk of `size` bytes in memory, or skip the test where that is not permitted."""
    place = folder / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("there is no mount command")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(ballast: Path) -> None:
    """Write until the disk is full."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass


def test_a_disk_that_is_too_small_is_told_before_a_byte_is_fetched(hub: Hub, tmp_path: Path) -> None:
    """F42: `no_space` once, and the next pull works without a restart."""
    with small_disk(tmp_path, 3 << 20) as disk, LoneHive(tmp_path, disk) as hive:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(2 << 20))
        error = hive.error("model_download", "org/tiny")

        assert error["code"] == "no_space"
        assert error["retryable"] is False
        assert "are missing" in error["message"]
        assert hub.bodies("/resolve/") + hub.bodies("/blobs/") == []
        ballast.unlink()
        hive.run("model_download", "org/tiny")
        assert hive.listed() == ["org/tiny"]


def test_a_disk_that_fills_in_mid_download_keeps_what_came(hub: Hub, tmp_path: Path) -> None:
    """F42, with somebody else who takes the space that was free when it was checked."""
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail("hold", path, after=1_048_576, times=1)
    with small_disk(tmp_path, 4 << 20) as disk, LoneHive(tmp_path, disk) as hive:
        job_id = hive.submit("model_download", "org/tiny")
        until(lambda: hive.partial_size() >= 1_048_576, "half of it is here")
        ballast = disk / "ballast"
        fill(ballast)
        hub.go_on()
        events = hive.read(job_id)

        assert [event["code"] for event in events if event["action"] == "error"] == ["no_space"]
        kept = hive.partial_size()
        assert kept >= 1_048_576
        ballast.unlink()
        hive.run("model_download", "org/tiny")
        assert hub.bodies(path)[-1].headers["range"].startswith(f"bytes={kept}-")
        assert sums_of(disk / "org/tiny") == sums_of(TINY)


# --- another hive ----------------------------------------------------------------------------------------


class SecondHive:
    """Another hive of a cluster, with a models folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path, models: Path) -> None:
        self.service = Service(
            "rbee-hive",
            [
                *("--port", "0", "--hive-id", "box2", "--queen-url", cluster.queen.url),
                *("--models-dir", str(models), "--state-dir", str(folder / "state2")),
                *("--worker-engine", "sim"),
            ],
            folder / "box2.log",
            cluster.marker,
            cluster.token,
        )


def has_model(cluster: Cluster, hive_id: str, model: str) -> bool:
    hives = cluster.run({"operation": "hive_list"})["hives"]
    return any(
        hive["hive_id"] == hive_id and model in [info["model"] for info in hive.get("models", [])]
        for hive in hives
    )


def test_a_model_comes_from_another_hive_of_the_cluster(hub: Hub, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(TINY, theirs / "rbee-tiny")
    with Cluster(tmp_path, engine="sim", models=tmp_path / "ours", token="t" * 32) as cluster:
        second = SecondHive(cluster, tmp_path, theirs)
        try:
            until(lambda: has_model(cluster, "box2", "rbee-tiny"), "the queen knows who has it")
            events = cluster.events(
                {"operation": "model_download", "model": "rbee-tiny", "hive_id": "box1", "source": "hive"}
            )
        finally:
            second.service.terminate()

    assert events[-1]["action"] == "execute_complete", events[-1]
    complete = next(event for event in events if event["action"] == "model_download_complete")
    assert complete["data"]["source"] == "hive box2"
    assert sums_of(tmp_path / "ours/rbee-tiny") == sums_of(TINY)
    assert hub.asked == []


def test_a_hive_that_dies_while_it_gives_is_followed_by_the_hub(hub: Hub, tmp_path: Path) -> None:
    """A large file, so that it is on its way for as long as the kill needs; the hub has the same one."""
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    files[WEIGHTS] = os.urandom(1 << 20) * 96
    hub.add("org/big", files)
    for name, data in files.items():
        place = tmp_path / "theirs/org/big" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    with Cluster(tmp_path, engine="sim", models=tmp_path / "ours") as cluster:
        second = SecondHive(cluster, tmp_path, tmp_path / "theirs")
        try:
            until(lambda: has_model(cluster, "box2", "org/big"), "the queen knows who has it")
            manifest = f"{second.service.url}/v1/models/org/big/manifest"
            until(lambda: httpx.get(manifest, timeout=30).status_code == 200, "its sums are known")

            over = threading.Event()

            def kill() -> None:
                staging = tmp_path / "ours/.downloads/org%2Fbig"
                until(lambda: over.is_set() or largest(staging.glob("*.part")), "it gives, or has given", 300)
                second.service.kill()

            killer = threading.Thread(target=kill)
            killer.start()
            try:
                download = {"operation": "model_download", "model": "org/big", "hive_id": "box1"}
                events = cluster.events(download)
            finally:
                over.set()
                killer.join(60)
        finally:
            second.service.kill()

    assert events[-1]["action"] == "execute_complete", events[-1]
    complete = next(event for event in events if event["action"] == "model_download_complete")
    assert complete["data"]["source"] in ("the hub", "hive box2")  # where it was quicker than its end
    assert sums_of(tmp_path / "ours/org/big") == {
        name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())
    }
