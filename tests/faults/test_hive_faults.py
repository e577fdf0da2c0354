"""A hive's workers under everything that can happen to them and to it. Real processes; the sim engine."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from rbee_ports import HeldPort
from rbee_processes import (
    BIN,
    Cluster,
    Service,
    is_alive,
    marked_processes,
    stream,
    text_of,
    until,
)
from rbee_restarts import Reader

pytestmark = pytest.mark.timeout(600)

SOON_AGAIN = ("--worker-backoff-first-s", "0.2")
"""A hive that starts a worker again at once. When it gives one up, only the tests of that make shorter."""


class HiveCluster(Cluster):
    """A cluster whose hive can be killed and started again on its port."""

    def __init__(self, folder: Path, *hive_args: str, queen_args: tuple[str, ...] = ()) -> None:
        super().__init__(folder, engine="sim", hive_args=hive_args, queen_args=queen_args)
        self._starts = 1

    def start_hive(self) -> None:
        """Start it again with the same port and state folder; the queen speaks to this one then."""
        before = self._boot()
        self._starts += 1
        port = self.hive.url.rpartition(":")[2]
        log = self.folder / f"hive{self._starts}.log"
        self.hive = Service("rbee-hive", ["--port", port, *self._hive_args], log, self.marker)
        until(self._is_online, "the hive is online again")
        until(lambda: self._boot() != before, "the queen has heard the new hive")
        # Its heartbeats and its events come on lines of their own, each taken up when its turn has come.
        until(self._answers_the_queen, "the queen has its line to the hive again")

    def _boot(self) -> str:
        (hive,) = self.run({"operation": "hive_list"})["hives"]
        return str(hive["boot"])

    def _answers_the_queen(self) -> bool:
        last = self.events({"operation": "device_list"})[-1]
        return bool(last["action"] == "execute_complete")

    def kill_hive(self) -> None:
        self.hive.kill()

    def until_recorded(self, worker_id: str, **facts: Any) -> dict[str, Any]:
        """Wait until a worker's record on disk has some facts, for a hive that is killed then."""

        def found() -> dict[str, Any] | None:
            record = self.records().get(worker_id, {})
            return record if facts.items() <= record.items() else None

        return until(found, f"the record of {worker_id} has {facts}")

    def until_no_record(self) -> None:
        """Wait until no worker has a record: it goes after the worker, in a thread of the hive's."""
        until(lambda: self.records() == {}, "no worker has a record")

    def until_no_worker(self) -> None:
        """Wait until the hive has no worker: one that has failed goes once nothing of it is left."""
        until(
            lambda: not self.run({"operation": "worker_list"}, self.hive.url)["workers"], "it has no worker"
        )

    def until_serving(self, tokens: int = 5) -> None:
        """Wait until the queen, who hears of a worker later than its hive, has requests answered."""
        until(
            lambda: len(text_of(self.events(infer(max_tokens=tokens))).split()) == tokens,
            "it serves through the queen",
        )

    def worker(self, worker_id: str) -> dict[str, Any]:
        got: dict[str, Any] = self.run({"operation": "worker_get", "worker_id": worker_id}, self.hive.url)
        return {"restarts": 0, "adopted": False} | got

    def reaches(self, worker_id: str, state: str, timeout_s: float = 120.0, **facts: Any) -> dict[str, Any]:
        """Wait until a worker is in a state, and has some facts."""
        wanted = {"state": state} | facts

        def found() -> dict[str, Any] | None:
            info = self.worker(worker_id)
            return info if wanted.items() <= info.items() else None

        return until(found, f"{worker_id} is {wanted}", timeout_s)

    def records(self) -> dict[str, dict[str, Any]]:
        """The workers' records on disk, by id."""
        found = {}
        for path in (self.state_dir / "workers").glob("*.json"):
            with suppress(FileNotFoundError):  # it has been taken away since
                found[path.stem] = json.loads(path.read_bytes())
        return found

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.hive.log() if line.get("event") == event]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[HiveCluster]:
    with HiveCluster(tmp_path, *SOON_AGAIN) as cluster:
        yield cluster


def infer(**fields: Any) -> dict[str, Any]:
    base = {"operation": "infer", "model": "m", "prompt": "one two", "max_tokens": 5, "ignore_eos": True}
    return base | {"resume_window_s": 120} | fields


def spawn(*args: str, **fields: Any) -> dict[str, Any]:
    return {"operation": "worker_spawn", "model": "m", "worker_args": list(args)} | fields


def error_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    return next(event for event in events if event["action"] == "error")


# --- workers that fail ---------------------------------------------------------------------------------


def test_a_killed_worker_is_started_again_under_its_id(cluster: HiveCluster) -> None:
    """F08: it serves again by itself, as another process; the list tells what happened."""
    before = cluster.spawn("m")
    os.kill(before["pid"], signal.SIGKILL)
    after = cluster.reaches(before["worker_id"], "ready", restarts=1)

    assert after["pid"] != before["pid"]
    assert after["signal"] == signal.SIGKILL
    assert after["cause"] == "was ended by signal 9"
    cluster.until_serving()
    assert cluster.records()[before["worker_id"]]["pid"] == after["pid"]


def test_a_worker_that_dies_again_and_again_is_given_up(cluster: HiveCluster) -> None:
    """The start limit: three starts in ten minutes, then `failed` with cause and last log lines."""
    worker_id = cluster.spawn("m")["worker_id"]
    for restarts in range(3):
        pid = cluster.reaches(worker_id, "ready", restarts=restarts)["pid"]
        os.kill(pid, signal.SIGKILL)
    failed = cluster.reaches(worker_id, "failed")

    assert failed["restarts"] == 2
    assert "started 3 times in 600 s" in failed["cause"]
    assert failed["log_tail"]
    cluster.until_no_record()
    cluster.until_seen(worker_id, "failed")
    error = error_of(cluster.events(infer()))
    assert error["code"] == "no_worker"
    stopped = cluster.run({"operation": "worker_stop", "worker_id": worker_id})
    assert stopped["state"] == "failed"
    assert cluster.run({"operation": "worker_list"})["workers"] == []


def test_a_worker_that_ignores_sigterm_is_killed_after_the_grace(cluster: HiveCluster) -> None:
    """F11."""
    spawned = cluster.spawn("m", "--sim-ignore-sigterm")
    stopped = cluster.run({"operation": "worker_stop", "worker_id": spawned["worker_id"], "grace_s": 1})

    assert (stopped["state"], stopped["signal"]) == ("stopped", signal.SIGKILL)
    assert not is_alive(spawned["pid"])
    cluster.until_no_record()


def test_a_stuck_worker_is_not_ready_until_it_answers(tmp_path: Path) -> None:
    """F13: K polls without an answer; one answer brings it back by itself."""
    with HiveCluster(tmp_path, "--worker-silence-s", "600") as cluster:
        spawned = cluster.spawn("m")
        os.kill(spawned["pid"], signal.SIGSTOP)
        cluster.reaches(spawned["worker_id"], "starting", restarts=0)
        os.kill(spawned["pid"], signal.SIGCONT)
        back = cluster.reaches(spawned["worker_id"], "ready")

        assert (back["pid"], back["restarts"]) == (spawned["pid"], 0)


def test_a_worker_that_stays_stuck_is_started_again(tmp_path: Path) -> None:
    """F13: alive, and silent for too long."""
    with HiveCluster(tmp_path, *SOON_AGAIN, "--worker-silence-s", "8") as cluster:
        spawned = cluster.spawn("m")
        pid = spawned["pid"]
        os.kill(pid, signal.SIGSTOP)
        after = cluster.reaches(spawned["worker_id"], "ready", restarts=1)

        assert after["pid"] != pid
        assert "without an answer" in after["cause"]
        assert not is_alive(pid)


def test_a_stalled_engine_ends_its_jobs_and_is_started_again(tmp_path: Path) -> None:
    """F03: requests run and no step is made, while the worker's API answers as ever."""
    with HiveCluster(tmp_path, *SOON_AGAIN, "--worker-stall-s", "3") as cluster:
        spawned = cluster.spawn("m", "--sim-stall-after-tokens", "20")
        events = cluster.events(infer(max_tokens=100))

        error = error_of(events)
        assert error["code"] == "worker_lost"
        assert "stalled: no engine step" in error["message"]
        after = cluster.reaches(spawned["worker_id"], "ready", restarts=1)
        assert "stalled" in after["cause"]


def test_an_idle_engine_that_answers_no_probe_is_started_again(tmp_path: Path) -> None:
    """Found without a request: the sim stalls after as many tokens as its probes take."""
    soon = ("--worker-stall-s", "3", "--worker-probe-s", "1", "--worker-probes-failed", "2")
    with HiveCluster(tmp_path, *SOON_AGAIN, *soon) as cluster:
        worker_id = cluster.spawn("m", "--sim-stall-after-tokens", "2")["worker_id"]

        # The one that is started again stalls as soon, so that it is not ready for long.
        until(lambda: cluster.worker(worker_id)["restarts"] > 0, "it is started again", 240)
        assert "stalled" in cluster.worker(worker_id)["cause"]


# --- spawns --------------------------------------------------------------------------------------------


def spawned_together(
    cluster: HiveCluster, operation: dict[str, Any], count: int
) -> list[list[dict[str, Any]]]:
    """Give the events of spawns that all wait for one start: it stands still until the last has joined it."""
    with ThreadPoolExecutor(count) as pool, ExitStack() as streams:
        jobs = list(pool.map(lambda _: cluster.submit(operation, Prefer="respond-async"), range(count)))
        until(lambda: any(record["pid"] for record in cluster.records().values()), "its process runs")
        (record,) = cluster.records().values()
        os.kill(record["pid"], signal.SIGSTOP)
        try:
            frames = [streams.enter_context(stream(cluster.queen.url, job_id)) for job_id in jobs]
            begun = [until_said(each, "worker_spawn_start") for each in frames]
        finally:
            os.kill(record["pid"], signal.SIGCONT)
        rest = pool.map(lambda each: [event for _, event in each], frames)
        return [had + left for had, left in zip(begun, rest, strict=True)]


def until_said(frames: Iterator[tuple[str, dict[str, Any]]], action: str) -> list[dict[str, Any]]:
    """Read a stream up to an event."""
    had = []
    for _, event in frames:
        had.append(event)
        if event["action"] == action:
            return had
    raise AssertionError(f"the stream ended without {action}: {had}")


def test_twenty_spawns_of_one_model_are_one_worker(cluster: HiveCluster) -> None:
    """F28."""
    streams = spawned_together(cluster, spawn("--sim-start-s", "12"), 20)

    results = [events[-1]["data"] for events in streams]
    assert len({result["worker_id"] for result in results}) == 1
    starts = [next(e for e in events if e["action"] == "worker_spawn_start") for events in streams]
    assert [start["data"]["joined"] for start in starts].count(False) == 1
    assert any("whose start is under way" in start["message"] for start in starts)
    assert len(cluster.run({"operation": "worker_list"})["workers"]) == 1


def test_one_failing_spawn_fails_all_its_waiters_once_and_the_next_fail_fast(cluster: HiveCluster) -> None:
    """F14, F28."""
    streams = spawned_together(cluster, spawn("--sim-start-s", "12", "--sim-fail-start"), 8)

    errors = [[event for event in events if event["action"] == "error"] for events in streams]
    assert [len(found) for found in errors] == [1] * 8
    assert {found[0]["code"] for found in errors} == {"worker_spawn_failed"}
    assert len({found[0]["message"] for found in errors}) == 1
    assert "told to fail its start" in errors[0][0]["message"]
    assert len(cluster.logged("worker_started")) == 1
    cluster.until_no_worker()
    cluster.until_no_record()

    # The wait doubles with each failure, so after some the next is refused at once.
    def is_refused() -> bool:
        return "is tried again in" in error_of(cluster.events(spawn("--sim-fail-start")))["message"]

    until(is_refused, "a spawn fails fast", 240)
    assert cluster.spawn("m")["model"] == "m", "other arguments are another spawn"


def test_a_waiter_that_leaves_stops_a_spawn_only_if_it_is_the_last(cluster: HiveCluster) -> None:
    """F17."""
    operation = spawn("--sim-start-s", "600")
    first, second = (cluster.submit(operation) for _ in range(2))
    with stream(cluster.queen.url, first) as one, stream(cluster.queen.url, second) as two:
        started = [next(e for _, e in frames if e["action"] == "worker_spawn_start") for frames in (one, two)]
        (pid,) = {event["data"]["pid"] for event in started}
        httpx.delete(f"{cluster.queen.url}/v1/jobs/{first}")
        assert [event for _, event in one][-1]["action"] == "execute_cancelled"
        until(lambda: cluster.logged("job_ended"), "the hive knows of it")
        assert is_alive(pid)
        httpx.delete(f"{cluster.queen.url}/v1/jobs/{second}")
        until(lambda: not is_alive(pid), "the worker has ended")
    cluster.until_no_record()


@pytest.fixture
def cluster_with_ports(tmp_path: Path) -> Iterator[HiveCluster]:
    """A cluster whose first worker has a port that no other hive's worker gets when that one has ended."""
    with HeldPort() as held:
        ports = ("--worker-first-port", str(held), "--worker-last-port", "65535")
        with HiveCluster(tmp_path, *SOON_AGAIN, *ports) as cluster:
            yield cluster


def test_a_port_that_another_answers_on_is_never_believed(cluster_with_ports: HiveCluster) -> None:
    """F12: only the nonce proves a worker; whoever listens there in its place gets no request."""
    cluster = cluster_with_ports
    spawned = cluster.spawn("m")
    record = cluster.until_recorded(spawned["worker_id"], has_been_ready=True)
    cluster.kill_hive()
    worker = psutil.Process(spawned["pid"])
    worker.kill()
    until(lambda: not is_alive(spawned["pid"]), "the worker has ended")
    impostor = Service(
        "rbee-worker",
        [
            "--model",
            "m",
            "--engine",
            "sim",
            "--worker-id",
            spawned["worker_id"],
            "--port",
            str(record["port"]),
        ],
        cluster.folder / "impostor.log",
        "an impostor",
        token=record["token"],
    )
    try:
        cluster.start_hive()
        listed = cluster.worker(spawned["worker_id"])
        assert (listed["state"], listed["adopted"]) == ("failed", True)
        assert "while its hive was away" in listed["cause"]
        cluster.until_seen(spawned["worker_id"], "failed")
        assert error_of(cluster.events(infer()))["code"] == "no_worker"
        pinned = infer(worker_id=spawned["worker_id"])
        assert error_of(cluster.events(pinned, cluster.hive.url))["code"] == "worker_not_ready"
        assert cluster.spawn("m")["port"] != record["port"]
        assert impostor.process.poll() is None, "it was signalled"
    finally:
        impostor.terminate()


# --- hives that fail -----------------------------------------------------------------------------------


def test_a_killed_hives_workers_are_adopted_by_the_next(cluster: HiveCluster) -> None:
    """F04: same process, same port, same id; it serves, and can be stopped."""
    before = cluster.spawn("m")
    cluster.kill_hive()
    assert is_alive(before["pid"])
    cluster.start_hive()
    after = cluster.reaches(before["worker_id"], "ready")

    assert (after["pid"], after["port"], after["adopted"]) == (before["pid"], before["port"], True)
    cluster.until_serving()
    stopped = cluster.run({"operation": "worker_stop", "worker_id": before["worker_id"]})
    assert stopped["state"] == "stopped"
    assert not {"exit_code", "signal"} & set(stopped), "the status of an adopted process is not known"
    assert not is_alive(before["pid"])


def test_an_adopted_worker_that_dies_is_started_again(cluster: HiveCluster) -> None:
    before = cluster.spawn("m")
    cluster.kill_hive()
    cluster.start_hive()
    cluster.reaches(before["worker_id"], "ready")
    os.kill(before["pid"], signal.SIGKILL)
    after = cluster.reaches(before["worker_id"], "ready", restarts=1)

    assert after["pid"] != before["pid"]
    assert "another hive had started it" in after["cause"]


def test_a_worker_that_was_starting_is_adopted_and_becomes_ready(cluster: HiveCluster) -> None:
    job_id = cluster.submit(spawn("--sim-start-s", "15"), cluster.hive.url, Prefer="respond-async")
    until(lambda: any(r["pid"] for r in cluster.records().values()), "its process runs")
    cluster.kill_hive()
    (record,) = cluster.records().values()
    assert (record["has_been_ready"], record["spawn_job_id"]) == (False, job_id)
    cluster.start_hive()

    assert cluster.reaches(record["worker_id"], "ready")["pid"] == record["pid"]


def test_records_are_for_the_hives_user_only(cluster: HiveCluster) -> None:
    cluster.spawn("m")
    (path,) = (cluster.state_dir / "workers").glob("*.json")

    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0


def test_engine_processes_of_a_dead_worker_are_reaped_by_the_next_hive(cluster: HiveCluster) -> None:
    """F04: what a worker has started is found by the nonce, in whatever session it is."""
    spawned = cluster.spawn("m")
    nonce = cluster.until_recorded(spawned["worker_id"], has_been_ready=True)["nonce"]
    core = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env=os.environ | {"RBEE_WORKER_NONCE": nonce},
        start_new_session=True,
    )
    reaper = threading.Thread(target=core.wait)
    reaper.start()
    cluster.kill_hive()
    os.kill(spawned["pid"], signal.SIGKILL)
    until(lambda: not is_alive(spawned["pid"]), "the worker has ended")
    cluster.start_hive()
    reaper.join(60)

    assert core.returncode == -signal.SIGKILL
    assert cluster.logged("worker_gone")[0]["reaped"] == [core.pid]


def test_a_foreign_process_with_a_recorded_pid_is_never_signalled(cluster: HiveCluster) -> None:
    """F09: the pid of a worker that has ended belongs to somebody else by now."""
    spawned = cluster.spawn("m")
    cluster.until_recorded(spawned["worker_id"], has_been_ready=True)
    cluster.kill_hive()
    os.kill(spawned["pid"], signal.SIGKILL)
    until(lambda: not is_alive(spawned["pid"]), "the worker has ended")
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        path = cluster.state_dir / "workers" / f"{spawned['worker_id']}.json"
        record = json.loads(path.read_bytes())
        ticks = int(Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()[19])
        path.write_text(json.dumps(record | {"pid": stranger.pid, "start_ticks": ticks}))
        cluster.start_hive()
        assert cluster.worker(spawned["worker_id"])["state"] == "failed"
        cluster.run({"operation": "worker_stop", "worker_id": spawned["worker_id"]})
        answer = cluster.events({"operation": "worker_process_delete", "pid": stranger.pid})
        assert error_of(answer)["code"] == "not_ours"
        assert cluster.hive.terminate() == 0
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_records_of_an_earlier_boot_are_forgotten(cluster: HiveCluster) -> None:
    spawned = cluster.spawn("m")
    cluster.kill_hive()
    path = cluster.state_dir / "workers" / f"{spawned['worker_id']}.json"
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps(record | {"boot_id": "another"}))
    cluster.start_hive()

    assert cluster.run({"operation": "worker_list"}, cluster.hive.url)["workers"] == []
    assert is_alive(spawned["pid"]), "nothing proves that it is ours"
    psutil.Process(spawned["pid"]).kill()


def test_two_hives_with_one_state_folder_are_one_too_many(cluster: HiveCluster) -> None:
    args = ["--port", "0", "--queen-url", "none", "--state-dir", str(cluster.state_dir)]
    done = subprocess.run(
        [BIN / "rbee-hive", *args], capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "another hive runs with the state folder" in line
    assert "--state-dir" in line


def test_a_worker_whose_hive_never_returns_stops_itself(tmp_path: Path) -> None:
    with HiveCluster(tmp_path, "--hive-absence-s", "10") as cluster:
        pid = cluster.spawn("m")["pid"]
        cluster.kill_hive()
        until(lambda: not is_alive(pid), "the worker has stopped", 120)

        assert cluster.queen.terminate() == 0
        assert marked_processes(cluster.marker) == []


# --- operations ----------------------------------------------------------------------------------------


def test_draining_a_worker_and_taking_it_back(cluster: HiveCluster) -> None:
    worker_id = cluster.spawn("m", "--sim-step-ms", "20")["worker_id"]
    running = cluster.submit(infer(max_tokens=150))
    with stream(cluster.queen.url, running) as frames:
        next(event for _, event in frames if event["action"] == "token")
        drained = cluster.run({"operation": "worker_drain", "worker_id": worker_id})
        assert drained["state"] == "draining"
        refused = error_of(cluster.events(infer(worker_id=worker_id), cluster.hive.url))
        assert (refused["code"], refused["retryable"]) == ("draining", True)
        assert [event for _, event in frames][-1]["action"] == "execute_complete", "what ran was not finished"
    cluster.until_recorded(worker_id, is_draining=True)
    cluster.kill_hive()
    cluster.start_hive()
    assert cluster.reaches(worker_id, "draining")["adopted"], "it is forgotten by a restart"
    cluster.run({"operation": "worker_drain", "worker_id": worker_id, "draining": False})
    cluster.reaches(worker_id, "ready")


def test_draining_the_hive_refuses_new_work(cluster: HiveCluster) -> None:
    worker_id = cluster.spawn("m")["worker_id"]
    drained = cluster.run({"operation": "hive_drain", "hive_id": "box1"})

    assert drained == {"draining": True, "running": 0}
    assert cluster.worker(worker_id)["state"] == "draining"
    refused = httpx.post(f"{cluster.hive.url}/v1/jobs", json=spawn())
    assert (refused.status_code, refused.json()["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    assert cluster.run({"operation": "hive_drain", "draining": False})["draining"] is False
    assert cluster.worker(worker_id)["state"] == "ready"


def test_a_model_is_unloaded_to_sleep_and_loaded_by_waking(cluster: HiveCluster) -> None:
    spawned = cluster.spawn("m", "--sim-sleep-mode")
    unloaded = cluster.run({"operation": "model_unload", "model": "m"})

    assert [worker["state"] for worker in unloaded["workers"]] == ["sleeping"]
    refused = error_of(cluster.events(infer(worker_id=spawned["worker_id"]), cluster.hive.url))
    assert refused["code"] == "worker_not_ready"
    loaded = cluster.run({"operation": "model_load", "model": "m"})
    assert (loaded["worker_id"], loaded["pid"], loaded["state"]) == (
        spawned["worker_id"],
        spawned["pid"],
        "ready",
    )
    assert len(text_of(cluster.events(infer(), cluster.hive.url)).split()) == 5


def test_a_model_whose_worker_cannot_sleep_is_unloaded_by_stopping_it(cluster: HiveCluster) -> None:
    first = cluster.run({"operation": "model_load", "model": "m"})
    unloaded = cluster.run({"operation": "model_unload", "model": "m"})

    assert [worker["state"] for worker in unloaded["workers"]] == ["stopped"]
    assert not is_alive(first["pid"])
    assert cluster.run({"operation": "model_load", "model": "m"})["pid"] != first["pid"]
    assert cluster.run({"operation": "model_unload", "model": "other"}) == {"model": "other", "workers": []}


def test_processes_are_listed_and_only_ours_are_ended(cluster: HiveCluster) -> None:
    spawned = cluster.spawn("m")
    listed = cluster.run({"operation": "worker_process_list"})["processes"]
    (own,) = [process for process in listed if process["kind"] == "worker"]

    assert (own["pid"], own["worker_id"]) == (spawned["pid"], spawned["worker_id"])
    assert own["memory"] > 0
    assert cluster.run({"operation": "worker_process_get", "pid": own["pid"]})["kind"] == "worker"
    refused = error_of(cluster.events({"operation": "worker_process_delete", "pid": os.getpid()}))
    assert refused["code"] == "not_ours"
    unknown = error_of(cluster.events({"operation": "worker_process_get", "pid": 2**22}))
    assert unknown["code"] == "process_not_found"
    cluster.run({"operation": "worker_process_delete", "pid": own["pid"]})
    assert cluster.reaches(spawned["worker_id"], "ready", restarts=1)["pid"] != own["pid"]


def test_a_workers_log_is_told_and_followed_to_its_end(cluster: HiveCluster) -> None:
    worker_id = cluster.spawn("m")["worker_id"]
    some = cluster.events({"operation": "worker_log", "worker_id": worker_id, "lines": 1})
    lines = [event for event in some if event["action"] == "worker_log"]
    assert [len(event["message"].splitlines()) for event in lines] == [1]
    assert some[-1]["data"] == {"worker_id": worker_id, "lines": 1}

    job_id = cluster.submit({"operation": "worker_log", "worker_id": worker_id, "follow": True, "lines": 5})
    with stream(cluster.queen.url, job_id) as frames:
        next(event for _, event in frames if event["action"] == "worker_log")
        cluster.run({"operation": "worker_stop", "worker_id": worker_id})
        rest = [event for _, event in frames]
    assert rest[-1]["action"] == "execute_complete"
    assert '"stopped"' in "".join(event["message"] for event in rest if event["action"] == "worker_log")

    after = cluster.events({"operation": "worker_log", "worker_id": worker_id, "follow": True})
    assert after[-1]["action"] == "execute_complete", "the log of a worker that is gone is kept"
    unknown = error_of(cluster.events({"operation": "worker_log", "worker_id": "never-was"}))
    assert unknown["code"] == "worker_not_found"


def test_a_spawn_that_finds_no_port_says_so(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        only = ("--worker-first-port", port, "--worker-last-port", port)
        with HiveCluster(tmp_path, *only) as cluster:
            error = error_of(cluster.events(spawn()))

    assert error["code"] == "no_port"
    assert error["retryable"] is True


# --- streams through a restart -------------------------------------------------------------------------


def long_infer(tokens: int, **fields: Any) -> dict[str, Any]:
    return infer(max_tokens=tokens, **fields)


def assert_whole(reader: Reader, tokens: int) -> None:
    """Every event once, in order, as if nothing had happened."""
    assert [e["index"] for e in reader.events if e["action"] == "token"] == list(range(tokens))
    assert [e["action"] for e in reader.events if e["action"] != "token"] == [
        "execute",
        "infer_start",
        "infer_schedule",
        "infer_worker",
        "infer_complete",
        "execute_complete",
    ]
    counts = [tuple(map(int, event_id.split("-"))) for event_id in reader.ids]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("how", ["killed", "told to leave"])
def test_streams_go_on_exactly_when_the_hive_is_restarted(cluster: HiveCluster, how: str) -> None:
    """F04: ten streams through the queen; the hive ends in their midst and comes back with its workers."""
    streams, tokens = 10, 1500
    worker = cluster.spawn("m", "--sim-step-ms", "4")
    jobs = [cluster.submit(long_infer(tokens, prompt=f"prompt {i}")) for i in range(streams)]
    readers = [Reader(cluster.queen.url, job_id) for job_id in jobs]
    with ThreadPoolExecutor(streams) as pool:
        results = [pool.submit(reader.read) for reader in readers]
        until(lambda: all(len(reader.events) > 30 for reader in readers), "all streams are under way", 120)
        if how == "killed":
            cluster.kill_hive()
        else:
            assert cluster.hive.terminate(signal.SIGUSR1) == 0
        assert is_alive(worker["pid"])
        cluster.start_hive()
        for result in results:
            result.result(300)

    for reader in readers:
        assert_whole(reader, tokens)
        # Whoever reads it again from the start gets the same.
        with stream(cluster.queen.url, reader.job_id) as frames:
            assert [event_id for event_id, _ in frames] == reader.ids
    assert cluster.worker(worker["worker_id"])["pid"] == worker["pid"]

    def states() -> list[str]:
        jobs = httpx.get(f"{cluster.hive.url}/v1/jobs?operation=infer&limit=100").json()["jobs"]
        return [job["state"] for job in jobs]

    assert len(states()) == streams, "a job was run twice"
    # A job that had ended before the kill is read from its worker again, for nobody who waits.
    until(lambda: set(states()) == {"completed"}, "the hive's jobs have completed")


def test_a_reader_of_the_hive_itself_goes_on_after_a_restart(cluster: HiveCluster) -> None:
    cluster.spawn("m", "--sim-step-ms", "5")
    reader = Reader(cluster.hive.url, cluster.submit(long_infer(1500), cluster.hive.url))
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(reader.read)
        until(lambda: len(reader.events) > 30, "the stream is under way")
        cluster.kill_hive()
        cluster.start_hive()
        result.result(300)

    assert [e["index"] for e in reader.events if e["action"] == "token"] == list(range(1500))
    assert reader.events[-1]["action"] == "execute_complete"


def test_a_job_that_ends_while_its_hive_is_away_is_told(cluster: HiveCluster) -> None:
    worker = cluster.spawn("m", "--sim-step-ms", "2")
    reader = Reader(cluster.queen.url, cluster.submit(long_infer(800)))
    token = cluster.records()[worker["worker_id"]]["token"]
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(reader.read)
        until(lambda: len(reader.events) > 30, "the stream is under way")
        cluster.kill_hive()
        bearer = {"Authorization": f"Bearer {token}"}
        url = f"http://127.0.0.1:{worker['port']}/v1/jobs"
        until(
            lambda: httpx.get(url, headers=bearer).json()["jobs"][0]["state"] == "completed",
            "the worker's job has completed",
        )
        cluster.start_hive()
        result.result(300)

    assert_whole(reader, 800)


def test_a_job_can_still_be_cancelled_after_a_restart(cluster: HiveCluster) -> None:
    worker = cluster.spawn("m", "--sim-step-ms", "20")
    job_id = cluster.submit(long_infer(20_000), Prefer="respond-async")
    until(lambda: cluster.worker(worker["worker_id"])["running"] == 1, "it runs")
    cluster.kill_hive()
    cluster.start_hive()
    (hive_job,) = httpx.get(f"{cluster.queen.url}/v1/jobs/{job_id}").json()["children"]
    restored = httpx.get(f"{cluster.hive.url}/v1/jobs/{hive_job}").json()
    assert (restored["state"], restored["operation"]) == ("running", "infer")
    httpx.delete(f"{cluster.queen.url}/v1/jobs/{job_id}")
    until(lambda: cluster.worker(worker["worker_id"])["running"] == 0, "the engine runs nothing")


def test_a_spawn_through_the_queen_goes_on_when_the_hive_is_restarted(cluster: HiveCluster) -> None:
    """The queen sends it again under its key, and it joins the worker that was begun for it."""
    job_id = cluster.submit(spawn("--sim-start-s", "12"), Prefer="respond-async")
    until(lambda: any(record["pid"] for record in cluster.records().values()), "its process runs")
    cluster.kill_hive()
    (record,) = cluster.records().values()
    cluster.start_hive()
    with stream(cluster.queen.url, job_id) as frames:
        last = [event for _, event in frames][-1]

    assert last["action"] == "execute_complete", last
    assert (last["data"]["worker_id"], last["data"]["pid"]) == (record["worker_id"], record["pid"])
    assert len(cluster.run({"operation": "worker_list"}, cluster.hive.url)["workers"]) == 1
