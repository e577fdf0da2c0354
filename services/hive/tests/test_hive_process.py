"""A real hive: its heartbeats on a socket, its own check through a job's stream, its settings from a file."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rbee_processes import MODELS, Service, marked_processes, stream, until

TOKEN = "a-token-of-a-test-cluster"
AUTH = {"Authorization": f"Bearer {TOKEN}"}


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Machine:
    """A hive with the `sim` engine, configured by a file, and what is asked of it."""

    def __init__(self, folder: Path, text: str, *args: str) -> None:
        self.marker = f"machine-{folder.name}"
        (folder / "hive.toml").write_text(
            f'hive_id = "box1"\nport = 0\nworker_engine = "sim"\nmodels_dir = "{MODELS}"\n'
            f'state_dir = "{folder}/state"\n{text}'
        )
        arguments = ["--config", str(folder / "hive.toml"), *args]
        self.hive = Service("rbee-hive", arguments, folder / "hive.log", self.marker, TOKEN)

    def close(self) -> None:
        self.hive.terminate()
        until(lambda: not marked_processes(self.marker), "nothing is left", 15)

    def heartbeats(self) -> Iterator[dict[str, Any]]:
        url = f"{self.hive.url}/v1/heartbeats/stream"
        with httpx.stream("GET", url, headers=AUTH, timeout=45) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line[6:])

    def events(self, operation: dict[str, Any]) -> list[dict[str, Any]]:
        answer = httpx.post(f"{self.hive.url}/v1/jobs", json=operation, headers=AUTH)
        assert answer.status_code == 200, answer.text
        with stream(self.hive.url, answer.json()["job_id"], **AUTH) as frames:
            return [event for _, event in frames]

    def run(self, operation: dict[str, Any]) -> Any:
        last = self.events(operation)[-1]
        assert last["action"] == "execute_complete", last
        return last["data"]


@pytest.fixture
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A hive on its own; its hub is a port that nobody listens on."""
    text, args = getattr(request, "param", ('queen_url = "none"\n', ()))
    text += f'[hub]\nendpoint = "http://127.0.0.1:{closed_port()}"\n'
    text += '[labels]\nzone = "a"\n[devices.cpu]\nmemory_kept_free = "512 MiB"\n'
    made = Machine(tmp_path, text, *args)
    yield made
    made.close()


def test_heartbeats_tell_the_machine_and_its_workers(machine: Machine) -> None:
    beats = machine.heartbeats()
    first, second, third = next(beats), next(beats), next(beats)

    assert (first["hive_id"], first["labels"], first["draining"]) == ("box1", {"zone": "a"}, False)
    assert first["timestamp"] < second["timestamp"] < third["timestamp"]
    assert 0 <= first["uptime_s"] < third["uptime_s"]
    assert {model["model"] for model in first["models"]} == {"rbee-tiny"}
    assert first["disk"]["total"] > first["disk"]["free"] > 0
    cpu = first["devices"][-1]
    assert (cpu["kind"], cpu["memory_kept_free"]) == ("cpu", 512 << 20)
    assert cpu["memory_total"] > cpu["memory_used"] > 0
    assert first["workers"] == []

    spawned = machine.run({"operation": "worker_spawn", "model": "rbee-tiny", "worker": "cpu"})
    worker = next(
        worker
        for beat in beats
        for worker in beat["workers"]
        if worker["state"] == "ready" and worker.get("memory_used")
    )

    assert worker["worker_id"] == spawned["worker_id"]
    assert (worker["port"], worker["pid"]) == (spawned["port"], spawned["pid"])
    assert {"running", "waiting", "kv_cache_usage"} <= worker.keys()
    assert worker["memory_used"] > 10 << 20
    assert worker["memory_reserved"] > 0
    told = machine.run({"operation": "device_list"})["devices"][-1]
    assert told["memory_reserved"] == worker["memory_reserved"]


def test_the_hive_checks_itself_and_narrates_each_finding(machine: Machine) -> None:
    events = machine.events({"operation": "hive_check"})
    result = events[-1]["data"]
    narrated = [event for event in events if event["action"] == "hive_check"]

    assert [event["data"] for event in narrated] == result["findings"]
    found = {finding["check"]: finding for finding in result["findings"]}
    assert {"engine", "driver", "cpu:0", "models", "state", "ports", "queen", "hub", "clock"} <= found.keys()
    assert {"open files", "shared memory"} <= found.keys()
    assert (found["hub"]["status"], found["queen"]["status"]) == ("warning", "ok")
    assert found["state"]["status"] == found["ports"]["status"] == "ok"
    assert result["ok"] == all(finding["status"] != "failed" for finding in result["findings"])
    for event in narrated:
        finding = event["data"]
        assert event["message"].startswith(f"{finding['check']}: {finding['message']}")
        assert finding["status"] == "ok" or finding["remedy"] in event["message"]


@pytest.mark.parametrize(
    "machine", [(f'queen_url = "http://127.0.0.1:{closed_port()}"\n', ())], indirect=True, ids=["closed"]
)
def test_a_queen_that_does_not_answer_is_a_failed_finding(machine: Machine) -> None:
    result = machine.run({"operation": "hive_check"})

    (queen,) = [finding for finding in result["findings"] if finding["check"] == "queen"]
    assert (queen["status"], result["ok"]) == ("failed", False)
    assert "--queen-url" in queen["remedy"]


def test_a_queen_with_another_token_is_a_failed_finding_and_the_right_one_is_ok(tmp_path: Path) -> None:
    queen_args = ["--port", "0", "--state-dir", str(tmp_path / "queen")]
    queen = Service("rbee-queen", queen_args, tmp_path / "queen.log", "check-queen", "another-token-1234567")
    friend = Service("rbee-queen", ["--port", "0", "--state-dir", str(tmp_path / "friend")],
                     tmp_path / "friend.log", "check-queen", TOKEN)  # fmt: skip
    try:
        for service, status in ((queen, "failed"), (friend, "ok")):
            folder = tmp_path / status
            folder.mkdir()
            machine = Machine(folder, f'queen_url = "{service.url}"\n')
            try:
                findings = machine.run({"operation": "hive_check"})["findings"]
            finally:
                machine.close()
            (found,) = [finding for finding in findings if finding["check"] == "queen"]
            assert found["status"] == status, found
            assert status == "ok" or "the same token" in found["remedy"]
    finally:
        queen.terminate()
        friend.terminate()
