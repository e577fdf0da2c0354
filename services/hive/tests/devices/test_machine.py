"""The machine's devices as the hive lists them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from rbee_processes import until

from rbee_contracts.nodes import Device, DeviceProcess
from rbee_hive.devices import (
    DeviceChoice,
    Devices,
    Reservations,
    foreign_memory,
    resident_memory,
    totals,
    visible,
    with_promises,
    worker_memory,
)
from rbee_hive.devices.cpu import cgroup_ram, read_ram
from rbee_hive.devices.machine import READ_AGAIN_AFTER_S
from rbee_hive.devices.nvml import GpuReading
from rbee_hive.devices.testing import FakeNvml, gpu

GIB = 1 << 30


class Ticks:
    """A clock that goes on far enough for a new reading at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += READ_AGAIN_AFTER_S
        return self.now


@contextmanager
def machine(*gpus: GpuReading, choice: DeviceChoice | None = None) -> Iterator[tuple[Devices, FakeNvml]]:
    nvml = FakeNvml(*gpus)
    devices = Devices(nvml, choice, clock=Ticks())
    devices.open()
    try:
        yield devices, nvml
    finally:
        devices.close()


def mig(uuid: str, index: int = 0, **facts: Any) -> GpuReading:
    return gpu(index, uuid=uuid, parent=f"GPU-{index:08d}", memory_total=10 * GIB, **facts)


def test_without_nvml_there_is_the_cpu_and_no_error() -> None:
    devices = Devices(FakeNvml(unavailable="NVML Shared Library Not Found"))
    devices.open()

    (cpu,) = devices.read()
    devices.close()

    assert (cpu.kind, cpu.index, devices.gpu_count) == ("cpu", 0, 0)
    assert cpu.cores == len(os.sched_getaffinity(0))
    assert cpu.memory_total is not None
    assert 0 < cpu.memory_total <= psutil.virtual_memory().total
    assert (devices.driver, devices.cuda) == (None, None)
    assert devices.why_no_nvml == "NVML Shared Library Not Found"


def test_gpus_come_first_with_what_they_tell() -> None:
    process = DeviceProcess(pid=7, memory=GIB)
    with machine(gpu(0, processes=(process,)), gpu(1, repair_pending=True)) as (devices, _):
        first, second, cpu = devices.read()

        assert (first.kind, first.index, first.uuid, first.driver) == ("cuda", 0, "GPU-00000000", "570.00")
        assert first.processes == [process]
        assert (first.health, second.health, cpu.kind) == ("ok", "degraded", "cpu")
        assert devices.working_gpus == [0, 1]
        assert devices.why_no_nvml is None


def test_a_gpu_that_is_lost_while_the_hive_runs_is_listed_as_failed() -> None:
    with machine(gpu(0), gpu(1)) as (devices, nvml):
        nvml.gpus[0] = GpuReading(index=0, uuid="GPU-00000000", name="Test GPU", lost="GPU is lost")

        first, second, _ = devices.read()

        assert (first.index, first.health, first.memory_total) == (0, "failed", None)
        assert first.issues[0].startswith("The GPU cannot be reached: GPU is lost.")
        assert second.health == "ok"
        assert devices.working_gpus == [1]
        assert totals(devices.last).keys() == {("cuda", 1), ("cpu", 0)}


def test_an_xid_changes_the_health_of_the_gpu_that_had_it() -> None:
    with machine(gpu(0), gpu(1)) as (devices, nvml):
        nvml.report("GPU-00000001", 13)
        nvml.report("GPU-00000001", 79)

        until(lambda: devices.read()[1].health == "failed", "the Xid has been taken in")

        assert devices.read()[0].health == "ok"
        assert devices.read()[1].issues == [
            "The driver reported Xid 79: it has fallen off the bus. Take it out of use, then reset it with "
            "nvidia-smi --gpu-reset or restart the machine."
        ]


def test_mig_slices_are_numbered_after_the_gpus_and_keep_their_number() -> None:
    with machine(mig("MIG-a"), mig("MIG-b"), gpu(1)) as (devices, nvml):
        listed = devices.read()

        assert [(device.index, device.uuid) for device in listed[:3]] == [
            (1, "GPU-00000001"),
            (2, "MIG-a"),
            (3, "MIG-b"),
        ]
        assert listed[1].mig_uuid == "GPU-00000000"
        assert listed[1].memory_total == 10 * GIB
        assert visible(listed, [1]) == "1"
        assert visible(listed, [3]) == "MIG-b"

        nvml.gpus = [mig("MIG-c"), mig("MIG-b"), gpu(1)]
        changed = {device.index: device for device in devices.read() if device.kind == "cuda"}

        assert {index: device.uuid for index, device in changed.items()} == {
            1: "GPU-00000001",
            2: "MIG-a",
            3: "MIG-b",
            4: "MIG-c",
        }
        assert (changed[2].health, changed[3].health) == ("failed", "ok")
        assert "MIG was changed" in changed[2].issues[0]


def test_an_xid_of_a_gpu_in_mig_mode_is_that_of_all_its_slices() -> None:
    with machine(mig("MIG-a"), mig("MIG-b")) as (devices, _):
        devices.note_xid("GPU-00000000", 48)

        assert [device.health for device in devices.read()[:2]] == ["failed", "failed"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (DeviceChoice(), [0, 1, 2]),
        (DeviceChoice(use=(1,)), [1]),
        (DeviceChoice(use=("GPU-00000002", 0)), [0, 2]),
        (DeviceChoice(ignore=(1, "GPU-00000002")), [0]),
        (DeviceChoice(use=(0, 1), ignore=(1,)), [0]),
        (DeviceChoice(use=()), []),
    ],
    ids=["all", "by-index", "by-uuid", "ignored", "both", "none"],
)
def test_gpus_that_the_configuration_leaves_out_are_not_listed(
    choice: DeviceChoice, expected: list[int]
) -> None:
    with machine(gpu(0), gpu(1), gpu(2), choice=choice) as (devices, _):
        assert [device.index for device in devices.read() if device.kind == "cuda"] == expected


def test_gpus_that_are_named_and_not_there() -> None:
    choice = DeviceChoice(use=(0, 7, "GPU-00000000", "MIG-a"), ignore=("GPU-9",))

    assert choice.not_among([mig("MIG-a")]) == [7, "GPU-9"]
    with machine(gpu(0), choice=choice) as (devices, _):
        assert devices.working_gpus == [0]


def test_a_slice_is_left_out_with_its_gpu() -> None:
    with machine(mig("MIG-a"), mig("MIG-b"), choice=DeviceChoice(ignore=("MIG-a",))) as (devices, _):
        assert [device.uuid for device in devices.read()[:-1]] == ["MIG-b"]
    with machine(mig("MIG-a"), gpu(1), choice=DeviceChoice(ignore=("GPU-00000000",))) as (devices, _):
        assert [device.uuid for device in devices.read()[:-1]] == ["GPU-00000001"]


def test_callers_close_to_each_other_share_one_reading() -> None:
    devices = Devices(FakeNvml(gpu(0)), clock=lambda: 0.0)
    devices.open()

    assert devices.read() is devices.read() is devices.last
    devices.close()


def test_promises_and_owners_are_told_with_the_devices() -> None:
    reservations = Reservations({("cuda", 0): 2 * GIB})
    reservations.update({("cuda", 0): 80 * GIB})
    reservations.reserve("w1", [("cuda", 0)], 10 * GIB)
    processes = (DeviceProcess(pid=7, memory=GIB), DeviceProcess(pid=8, memory=GIB))
    with machine(gpu(0, processes=processes)) as (devices, _):
        first, cpu = with_promises(devices.read(), reservations, {7: "w1"})

    assert (first.memory_reserved, first.memory_kept_free) == (10 * GIB, 2 * GIB)
    assert [process.worker_id for process in first.processes] == ["w1", None]
    assert cpu.memory_reserved == 0


def used(index: int, *processes: DeviceProcess) -> Device:
    return Device(kind="cuda", index=index, name="x", processes=list(processes))


def test_what_a_worker_uses_is_what_its_processes_use_on_the_fullest_of_its_gpus() -> None:
    listed = [
        used(0, DeviceProcess(pid=7, memory=3 * GIB), DeviceProcess(pid=9, memory=GIB)),
        used(1, DeviceProcess(pid=7, memory=4 * GIB), DeviceProcess(pid=8, memory=GIB)),
    ]

    assert worker_memory({7, 8}, listed, [0, 1]) == 5 * GIB
    assert worker_memory({7, 8}, listed, [0]) == 3 * GIB
    assert worker_memory({5}, listed, [0]) is None
    assert worker_memory({7}, [used(0, DeviceProcess(pid=7))], [0]) is None


@pytest.mark.parametrize(
    ("memory_used", "ours", "reserved", "expected"),
    [
        (5 * GIB, {7}, 70 * GIB, 2 * GIB),  # 3 GiB are ours; the driver has some besides the other process
        (5 * GIB, {5}, 0, 5 * GIB),
        (5 * GIB, {5}, 4 * GIB, GIB),  # a worker of ours that the driver knows by another number
        (5 * GIB, {5}, 70 * GIB, 0),
        (None, {7}, 0, GIB),
    ],
    ids=["told", "nothing-of-ours", "not-told", "not-told-and-starting", "no-total"],
)
def test_what_others_use_of_a_gpu(
    memory_used: int | None, ours: set[int], reserved: int, expected: int
) -> None:
    processes = [DeviceProcess(pid=7, memory=3 * GIB), DeviceProcess(pid=9, memory=GIB)]
    device = Device(kind="cuda", index=0, name="x", memory_used=memory_used, processes=processes)

    assert foreign_memory(device, ours, reserved) == expected


def test_memory_in_ram_of_a_process() -> None:
    assert (resident_memory({os.getpid()}) or 0) > 10 << 20
    assert resident_memory({2**22 + 1}) is None


def group(root: Path, proc: Path, lines: str, files: dict[str, str]) -> None:
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    group(
        root,
        proc,
        "0::/a/b\n",
        {
            "memory.max": "max\n",
            "a/memory.max": "1000000",
            "a/memory.current": "700000",
            "a/memory.stat": "anon 1\ninactive_file 200000\n",
            "a/b/memory.max": "2000000",
            "a/b/memory.current": "1",
        },
    )

    assert cgroup_ram(root, proc) == (1_000_000, 500_000)
    assert read_ram(root, proc).total == 1_000_000


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    group(
        root,
        proc,
        "9:name=systemd:/\n4:cpu,memory:/docker/x\n",
        {"memory/memory.limit_in_bytes": "4096000", "memory/memory.usage_in_bytes": "4096"},
    )

    assert cgroup_ram(root, proc) == (4_096_000, 4096)


@pytest.mark.parametrize("lines", ["", "nonsense\n", "0::/\n", "4:memory:/\n"])
def test_without_a_limit_the_machines_memory_counts(tmp_path: Path, lines: str) -> None:
    group(tmp_path / "cgroup", tmp_path / "proc", lines, {})

    assert cgroup_ram(tmp_path / "cgroup", tmp_path / "proc") is None
    assert read_ram(tmp_path / "cgroup", tmp_path / "proc").total == psutil.virtual_memory().total


def test_a_limit_above_the_machines_memory_is_none(tmp_path: Path) -> None:
    files = {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "4096"}
    group(tmp_path / "cgroup", tmp_path / "proc", "4:memory:/\n", files)

    assert read_ram(tmp_path / "cgroup", tmp_path / "proc").total == psutil.virtual_memory().total
