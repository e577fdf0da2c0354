"""NVML: one contract for the real one, for the real code over a stub library, and for the tests' fake.

The contract runs on a real GPU where there is one; on a machine without it says so and skips.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pynvml
import pytest
from rbee_nvml import StubGpu, StubLibrary

from rbee_contracts.nodes import DeviceProcess
from rbee_hive.devices.nvml import Nvml, NvmlUnavailable, RealNvml, Xid
from rbee_hive.devices.testing import FakeNvml, gpu

GIB = 1 << 30


def real() -> Nvml:
    nvml = RealNvml()
    try:
        nvml.open()
    except NvmlUnavailable as exc:
        pytest.skip(f"no GPU here: {exc}")
    nvml.close()
    return nvml


@pytest.fixture(params=["real", "stub", "fake"])
def nvml(request: pytest.FixtureRequest) -> Iterator[Nvml]:
    """NVML with at least one GPU, open."""
    made: Nvml
    match request.param:
        case "real":
            made = real()
        case "stub":
            made = RealNvml(StubLibrary(StubGpu("GPU-a"), StubGpu("GPU-b")))
        case _:
            made = FakeNvml(gpu(0), gpu(1))
    made.open()
    yield made
    made.close()


def test_every_gpu_has_its_place_identity_and_memory(nvml: Nvml) -> None:
    readings = nvml.read()

    assert readings
    assert len({reading.uuid for reading in readings}) == len(readings)
    for reading in readings:
        assert reading.index >= 0
        assert reading.uuid.startswith(("GPU-", "MIG-"))
        assert reading.name
        assert reading.lost is None
        assert reading.memory_total is not None
        assert reading.memory_used is not None
        assert 0 <= reading.memory_used <= reading.memory_total


def test_readings_are_plausible_or_none(nvml: Nvml) -> None:
    for reading in nvml.read():
        assert reading.utilization is None or 0 <= reading.utilization <= 100
        assert reading.temperature is None or 0 < reading.temperature < 150
        assert reading.power is None or 0 < reading.power < 3000
        assert reading.ecc_uncorrected is None or reading.ecc_uncorrected >= 0
        for process in reading.processes:
            assert process.pid > 0
            assert process.memory is None or process.memory >= 0


def test_driver_and_cuda_are_told(nvml: Nvml) -> None:
    assert nvml.driver
    assert nvml.cuda
    assert nvml.cuda.replace(".", "").isdecimal()


def test_places_and_identities_stay(nvml: Nvml) -> None:
    first = [(reading.index, reading.uuid) for reading in nvml.read()]

    assert [(reading.index, reading.uuid) for reading in nvml.read()] == first


def test_a_wait_without_an_xid_gives_none(nvml: Nvml) -> None:
    assert nvml.wait_xid(0.01) is None


def test_closing_twice_changes_nothing(nvml: Nvml) -> None:
    nvml.close()
    nvml.close()


@pytest.mark.parametrize("kind", ["stub", "fake"])
def test_a_machine_without_nvml(kind: str) -> None:
    library = StubLibrary(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    made: Nvml = (
        RealNvml(library) if kind == "stub" else FakeNvml(unavailable="NVML Shared Library Not Found")
    )

    with pytest.raises(NvmlUnavailable, match="NVML Shared Library Not Found"):
        made.open()


def opened(*gpus: StubGpu, has_events: bool = True) -> tuple[RealNvml, StubLibrary]:
    library = StubLibrary(*gpus, has_events=has_events)
    nvml = RealNvml(library)
    nvml.open()
    return nvml, library


def test_all_that_a_gpu_tells() -> None:
    compute = [SimpleNamespace(pid=7, usedGpuMemory=3 * GIB), SimpleNamespace(pid=9, usedGpuMemory=None)]
    graphics = [SimpleNamespace(pid=7, usedGpuMemory=3 * GIB), SimpleNamespace(pid=8, usedGpuMemory=GIB)]
    nvml, _ = opened(
        StubGpu(
            "GPU-a",
            ComputeRunningProcesses_v3=compute,
            GraphicsRunningProcesses_v3=graphics,
            TotalEccErrors=2,
            RemappedRows=(1, 2, 1, 0),
            CurrentClocksEventReasons=0x40,
            recovery=1,
        )
    )

    (reading,) = nvml.read()

    assert (nvml.driver, nvml.cuda) == ("570.124.06", "12.8")
    assert reading.memory_total == 80 * GIB
    assert (reading.utilization, reading.temperature, reading.power) == (12.0, 41.0, 71.5)
    assert reading.processes == (
        DeviceProcess(pid=7, memory=3 * GIB),
        DeviceProcess(pid=8, memory=GIB),
        DeviceProcess(pid=9, memory=None),
    )
    assert (reading.ecc_uncorrected, reading.repair_pending, reading.repair_failed) == (2, True, False)
    assert (reading.slowdown, reading.recovery) == (0x40, 1)


def test_what_a_gpu_does_not_tell_is_none() -> None:
    quiet = StubGpu("GPU-a", recovery=None)
    quiet.silent = set(quiet.facts) - {"Name"}
    nvml, _ = opened(quiet)

    (reading,) = nvml.read()

    assert reading == type(reading)(index=0, uuid="GPU-a", name="Stub GPU")


def test_an_older_driver_calls_the_clocks_reasons_by_their_old_name() -> None:
    nvml, library = opened(StubGpu("GPU-a", CurrentClocksThrottleReasons=0x80))
    vars(library)["nvmlDeviceGetCurrentClocksEventReasons"] = None

    assert nvml.read()[0].slowdown == 0x80


@pytest.mark.parametrize(
    "error",
    [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_UNKNOWN],
    ids=["lost", "reset", "unknown"],
)
def test_a_gpu_that_falls_off_the_bus_is_told_as_lost_and_the_others_go_on(error: int) -> None:
    lost, well = StubGpu("GPU-a"), StubGpu("GPU-b")
    nvml, _ = opened(lost, well)
    lost.error = error

    first, second = nvml.read()

    assert (first.index, first.uuid, first.name) == (0, "GPU-a", "Stub GPU")
    assert first.lost
    assert first.memory_total is None
    assert (second.uuid, second.lost) == ("GPU-b", None)

    lost.error = None
    assert nvml.read()[0].lost is None


def test_a_gpu_that_was_lost_before_the_start_keeps_its_place() -> None:
    lost = StubGpu("GPU-a")
    lost.error = pynvml.NVML_ERROR_GPU_IS_LOST
    nvml, _ = opened(lost, StubGpu("GPU-b"))

    first, second = nvml.read()

    assert (first.index, first.lost) == (0, "it could not be reached when the hive started")
    assert (second.index, second.uuid) == (1, "GPU-b")


def test_a_gpu_in_mig_mode_is_its_slices() -> None:
    memory = SimpleNamespace(total=10 * GIB, used=GIB)
    parent = StubGpu("GPU-a", MigMode=[1, 1], UtilizationRates=None)
    parent.slices = [
        StubGpu(f"MIG-{place}", Name="Stub GPU MIG 1g.10gb", MemoryInfo=memory,
                ComputeRunningProcesses_v3=[SimpleNamespace(pid=place, usedGpuMemory=GIB)])
        for place in (1, 2)
    ]  # fmt: skip
    nvml, _ = opened(parent, StubGpu("GPU-b"))

    first, second, whole = nvml.read()

    assert (first.uuid, first.parent, first.name) == ("MIG-1", "GPU-a", "Stub GPU MIG 1g.10gb")
    assert (second.uuid, second.memory_total, second.index) == ("MIG-2", 10 * GIB, 0)
    assert [process.pid for process in second.processes] == [2]
    assert second.utilization is None
    assert (whole.uuid, whole.parent) == ("GPU-b", None)


def test_a_gpu_in_mig_mode_without_slices_says_so() -> None:
    nvml, _ = opened(StubGpu("GPU-a", MigMode=[1, 1]))

    assert nvml.read()[0].without_slices


def test_an_xid_is_told_with_the_gpu_that_had_it() -> None:
    first, second = StubGpu("GPU-a"), StubGpu("GPU-b")
    nvml, library = opened(first, second)
    library.events += [
        (second, pynvml.nvmlEventTypeXidCriticalError, 79),
        (first, pynvml.nvmlEventTypeClock, 5),
    ]
    second.error = pynvml.NVML_ERROR_GPU_IS_LOST

    assert nvml.wait_xid(1.0) == Xid(uuid="GPU-b", code=79)
    assert nvml.wait_xid(1.0) is None
    assert nvml.wait_xid(0.0) is None


@pytest.mark.parametrize("kind", ["no-events", "no-gpu-tells"])
def test_where_xids_cannot_be_told_a_wait_gives_none(kind: str) -> None:
    silent = StubGpu("GPU-a")
    silent.silent = {"events"}
    nvml, library = opened(silent, has_events=kind == "no-gpu-tells")

    assert nvml.wait_xid(10.0) is None
    nvml.close()
    assert library.calls.count("shutdown") == 1


def test_a_wait_that_fails_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml, library = opened(StubGpu("GPU-a"))
    asked = []

    def fail(*_: object) -> None:
        asked.append(1)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    monkeypatch.setattr(library, "nvmlEventSetWait_v2", fail)

    assert nvml.wait_xid(1.0) is None
    assert nvml.wait_xid(1.0) is None
    assert len(asked) == 1
