"""The heartbeat: put together from parts of which none waits for another."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rbee_processes import until

from rbee_contracts.nodes import Device, DeviceProcess, Disk, ModelInfo, WorkerInfo
from rbee_hive import telemetry as module
from rbee_hive.devices import Reservations
from rbee_hive.presence import next_due
from rbee_hive.telemetry import Telemetry
from rbee_job_server.beats import BEAT_EVERY_S

GIB = 1 << 30


class FakeDevices:
    def __init__(self) -> None:
        self.hangs = threading.Event()
        self.has_hung = threading.Event()
        self.goes_on = threading.Event()
        self.count = 0

    def read(self) -> list[Device]:
        if self.hangs.is_set():
            self.has_hung.set()
            self.goes_on.wait()
        self.count += 1
        processes = [DeviceProcess(pid=7, memory=3 * GIB)]
        return [
            Device(kind="cuda", index=0, name="GPU", memory_total=80 * GIB, memory_used=self.count,
                   processes=processes)
        ]  # fmt: skip


class FakeModels:
    def __init__(self) -> None:
        self.fails = False
        self.count = 0
        self.users: Callable[[], Mapping[str, Sequence[str]]] = lambda: {"m": ["w1"]}

    def find(self) -> list[ModelInfo]:
        self.count += 1
        if self.fails:
            raise OSError("the disk is gone")
        return [ModelInfo(model="m", size=self.count, files=1)]

    def disk(self) -> Disk:
        return Disk(total=100, free=50, reserved=0, models=1)

    def with_users(self, info: ModelInfo, users: Mapping[str, Sequence[str]]) -> ModelInfo:
        return ModelInfo(model=info.model, size=info.size, files=1, used_by=list(users.get(info.model, ())))


class FakeWorkers:
    def __init__(self, kind: Any = "cuda") -> None:
        self.draining = False
        self.used: dict[str, int | None] = {}
        self.kind = kind

    def owners(self) -> dict[int, str]:
        return {7: "w1"}

    def note_memory(self, used: Mapping[str, int | None]) -> None:
        self.used.update(used)

    def infos(self) -> list[WorkerInfo]:
        return [
            WorkerInfo(worker_id="w1", model="m", state="ready", pid=7, port=9300, running=0, waiting=0,
                       kv_cache_usage=0.0, worker=self.kind, devices=[0], started_at="now",
                       memory_used=self.used.get("w1"))
        ]  # fmt: skip


class Parts:
    def __init__(self, *, is_sim: bool = False, kind: str = "cuda", first_reading_s: float = 20.0) -> None:
        self.devices, self.models, self.workers = FakeDevices(), FakeModels(), FakeWorkers(kind)
        reservations = Reservations({("cuda", 0): GIB})
        reservations.update({("cuda", 0): 80 * GIB})
        reservations.reserve("w1", [("cuda", 0)], 72 * GIB)
        self.telemetry = Telemetry(
            hive_id="box1",
            labels={"zone": "a"},
            workers=self.workers,
            devices=self.devices,
            models=self.models,
            reservations=reservations,
            is_sim=is_sim,
            read_every_s=0.01,
            first_reading_s=first_reading_s,
        )


@pytest.fixture
def parts() -> Iterator[Parts]:
    made = Parts()
    yield made
    made.devices.goes_on.set()
    made.telemetry.stop()


async def test_a_heartbeat_tells_everything(parts: Parts) -> None:
    parts.workers.draining = True
    await parts.telemetry.start()

    beat = parts.telemetry.heartbeat("boot1")

    assert (beat.hive_id, beat.boot, beat.labels, beat.draining) == ("box1", "boot1", {"zone": "a"}, True)
    assert beat.disk == Disk(total=100, free=50, reserved=0, models=1)
    assert beat.uptime_s >= 0
    (device,) = beat.devices
    assert (device.memory_reserved, device.memory_kept_free) == (72 * GIB, GIB)
    assert device.processes[0].worker_id == "w1"
    assert beat.workers[0].memory_used == 3 * GIB
    assert beat.models[0].used_by == ["w1"]


@pytest.mark.parametrize(("is_sim", "kind"), [(False, "cpu"), (True, "cuda")], ids=["cpu", "sim"])
async def test_a_worker_without_a_gpu_uses_ram(
    is_sim: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts(is_sim=is_sim, kind=kind)
    monkeypatch.setattr(module, "resident_memory", lambda pids: 1000 + len(pids))
    await parts.telemetry.start()

    assert parts.telemetry.heartbeat("b").workers[0].memory_used == 1001
    parts.telemetry.stop()


async def test_ram_is_measured_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(kind="cpu")
    measured_by: set[threading.Thread] = set()

    def measure(pids: set[int]) -> int:
        measured_by.add(threading.current_thread())
        return 1

    monkeypatch.setattr(module, "resident_memory", measure)
    await parts.telemetry.start()
    for _ in range(3):
        parts.telemetry.heartbeat("b")
    parts.telemetry.stop()

    assert measured_by
    assert threading.current_thread() not in measured_by


async def test_a_device_that_hangs_delays_only_its_own_part(parts: Parts) -> None:
    await parts.telemetry.start()
    parts.devices.hangs.set()
    until(parts.devices.has_hung.is_set, "a reading of the devices hangs")
    seen = parts.models.count

    until(lambda: parts.models.count >= seen + 5, "the models are read on")
    first = parts.telemetry.heartbeat("b")
    second = parts.telemetry.heartbeat("b")

    assert first.devices[0].memory_used == second.devices[0].memory_used
    assert first.models[0].size >= seen + 4

    parts.devices.hangs.clear()
    parts.devices.goes_on.set()
    frozen = first.devices[0].memory_used or 0
    until(
        lambda: (parts.telemetry.heartbeat("b").devices[0].memory_used or 0) > frozen + 1,
        "the devices are read again",
    )


async def test_a_part_that_hangs_from_the_beginning_is_told_empty() -> None:
    parts = Parts(first_reading_s=0.2)
    parts.devices.hangs.set()

    await parts.telemetry.start()

    assert parts.telemetry.heartbeat("b").devices == []
    parts.devices.goes_on.set()
    parts.telemetry.stop()


async def test_a_reading_that_fails_leaves_the_newest_value(parts: Parts) -> None:
    await parts.telemetry.start()
    parts.models.fails = True
    seen = parts.models.count
    until(lambda: parts.models.count > seen + 2, "it has failed some times")
    newest = parts.telemetry.heartbeat("b").models[0].size

    assert newest <= seen + 1

    parts.models.fails = False
    until(lambda: parts.telemetry.heartbeat("b").models[0].size > newest, "it is read again")


@settings(deadline=None)
@given(due=st.floats(0, 1e6), late_s=st.floats(0, 1e4))
def test_what_a_heartbeat_costs_does_not_move_the_next_one(due: float, late_s: float) -> None:
    found = next_due(due, due + late_s)
    periods = (found - due) / BEAT_EVERY_S

    assert periods == pytest.approx(round(periods), abs=1e-6)
    assert due + late_s - 1e-6 <= found <= due + late_s + BEAT_EVERY_S + 1e-6
    assert found >= due + BEAT_EVERY_S


@settings(deadline=None)
@given(waits=st.lists(st.floats(0, 0.9), max_size=30))
def test_heartbeats_that_tell_of_changes_do_not_put_off_the_next_one(waits: list[float]) -> None:
    """A hive whose workers change often would fall silent for seconds, and be taken for unreachable."""
    due = now = 100.0
    for wait_s in waits:
        due = next_due(due, now)

        assert now <= due <= now + BEAT_EVERY_S
        now = min(due, now + wait_s)
