"""Processes as the operating system sees them: whose they are, and what they have of the devices."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rbee_contracts.nodes import Device, DeviceProcess
from rbee_hive.supervisor.process_view import Owned, find_owned, view
from rbee_hive.supervisor.processes import LinuxSystem


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    env = os.environ | {"RBEE_WORKER_NONCE": "of-this-test"}
    script = "import time; print('here', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # a process that has begun only just has no environment yet
        yield process
        process.kill()


def owned(worker_id: str, *, is_leader: bool = False, leader_lives: bool = True) -> Owned:
    return Owned(worker_id=worker_id, is_leader=is_leader, leader_lives=leader_lives)


def test_ours_are_found_by_their_nonce(child: subprocess.Popen[bytes]) -> None:
    system = LinuxSystem()

    assert find_owned(system, {"of-this-test": ("w1", child.pid)}) == {child.pid: owned("w1", is_leader=True)}
    assert find_owned(system, {"of-this-test": ("w1", 2**22 + 1)}) == {
        child.pid: owned("w1", leader_lives=False)
    }
    assert find_owned(system, {"another": ("w1", child.pid)}) == {}


def test_kinds_and_memory_of_processes(child: subprocess.Popen[bytes]) -> None:
    me, gone = os.getpid(), 2**22 + 1
    device = Device(
        kind="cuda",
        index=1,
        name="g",
        processes=[
            DeviceProcess(pid=me, memory=7),
            DeviceProcess(pid=child.pid, memory=8),
            DeviceProcess(pid=gone),
        ],
    )
    found = view({child.pid: owned("w1", is_leader=True)}, [device])

    assert [(p.pid, p.kind, p.worker_id, p.devices) for p in found] == [
        (child.pid, "worker", "w1", {1: 8}),
        (me, "foreign", None, {1: 7}),
        (gone, "foreign", None, {1: None}),
    ]
    assert found[0].ppid == me
    assert found[0].memory
    assert found[0].user
    assert [p.kind for p in view({child.pid: owned("w1")}, [])] == ["engine"]
    assert [p.kind for p in view({child.pid: owned("w1", leader_lives=False)}, [])] == ["orphan"]
    assert view({gone: owned("w1")}, []) == [], "it has ended meanwhile"
