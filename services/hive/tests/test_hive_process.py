"""A real hive: its heartbeats on a socket, its own check through a job's stream, its settings from a file."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rbee_processes import MODELS, Service, marked_processes, stream, until

pytestmark = pytest.mark.timeout(180)

TOKEN = "a-token-of-a-test-cluster"
AUTH = {"Authorization": f"Bearer {TOKEN}"}


class Machine:
    """A hive with the `sim` engine, configured by a file, and what is asked of it."""

    def __init__(self, folder: Path, text: str) -> None:
        self.marker = f"machine-{os.getpid()}-{folder.name}"
        (folder / "hive.toml").write_text(
            f'hive_id = "box1"\nport = 0\nworker_engine = "sim"\nmodels_dir = "{MODELS}"\n'
            f'state_dir = "{folder}/state"\n{text}'
        )
        arguments = ["--config", str(folder / "hive.toml")]
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
        answer = httpx.post(f"{self.hive.url}/v1/jobs", json=operation, headers=AUTH, timeout=45)
        assert answer.status_code == 200, answer.text
        with stream(self.hive.url, answer.json()["job_id"], **AUTH) as frames:
            return [event for _, event in frames]

    def run(self, operation: dict[str, Any]) -> Any:
        last = self.events(operation)[-1]
        assert last["action"] == "execute_complete", last
        return last["data"]

    def answer_of_queen(self) -> dict[str, Any]:
        """Give what the hive's check says of her answer; nothing where none came in time."""
        findings = self.run({"operation": "hive_check"})["findings"]
        (found,) = [finding for finding in findings if finding["check"] == "queen"]
        return {} if "does not answer" in found["message"] else dict(found)


@pytest.fixture
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A hive on its own, or with the queen that a test names; at `closed`, its hub, nobody listens."""
    with socket.socket() as bound:  # so that nobody else gets the port
        bound.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{bound.getsockname()[1]}"
        text = getattr(request, "param", 'queen_url = "none"\n').format(closed=closed)
        text += f'[hub]\nendpoint = "{closed}"\n'
        text += '[labels]\nzone = "a"\n[devices.cpu]\nmemory_kept_free = "512 MiB"\n'
        made = Machine(tmp_path, text)
        yield made
        made.close()


def test_heartbeats_tell_the_machine_and_its_workers(machine: Machine) -> None:
    beats = machine.heartbeats()
    # What has not been read after five seconds is told empty at first.
    first = next(beat for beat in beats if beat["devices"] and beat["models"] and beat["disk"])
    second, third = next(beats), next(beats)

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
        if worker["state"] == "ready" and (worker.get("memory_used") or 0) > 10 << 20
    )

    assert worker["worker_id"] == spawned["worker_id"]
    assert (worker["port"], worker["pid"]) == (spawned["port"], spawned["pid"])
    assert {"running", "waiting", "kv_cache_usage"} <= worker.keys()
    assert worker["memory_reserved"] > 0
    told = machine.run({"operation": "device_list"})["devices"][-1]
    assert told["memory_reserved"] == worker["memory_reserved"]


def test_the_hive_checks_itself_and_narrates_each_finding(machine: Machine) -> None:
    def unhurried() -> list[dict[str, Any]]:
        """Nothing if the hive has given up a reading that came too late: it then tells of a hanging disk."""
        events = machine.events({"operation": "hive_check"})
        return [] if any("hangs" in event["message"] for event in events) else events

    events = until(unhurried, "all could be looked at in time", 120)
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


@pytest.mark.parametrize("machine", ['queen_url = "{closed}"\n'], indirect=True, ids=["closed"])
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
                found = until(machine.answer_of_queen, "the queen answers in time", 120)
            finally:
                machine.close()
            assert found["status"] == status, found
            assert status == "ok" or "the same token" in found["remedy"]
    finally:
        queen.terminate()
        friend.terminate()
