"""The machine's devices: GPUs by NVML where there is one, the CPU always."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import structlog
from msgspec import Struct, structs

from rbee_contracts.nodes import Device
from rbee_hive.devices.cpu import read_cpu
from rbee_hive.devices.health import OF_PROGRAMS, judge
from rbee_hive.devices.nvml import GpuReading, Nvml, NvmlUnavailable, RealNvml
from rbee_hive.devices.reservations import DeviceKey, Reservations

log = structlog.get_logger(__name__)

READ_AGAIN_AFTER_S = 0.2
"""A reading that is younger is given again: several callers within it cost one reading."""

XID_WAIT_S = 0.25
"""How long one wait for an Xid takes, and so how long `close` takes where NVML works."""

XID_STOP_S = 2.0
"""How long `close` waits for an NVML that hangs."""

XID_PAUSE_S = 5.0
"""The pause before NVML is asked again where it cannot tell Xids."""


class DeviceChoice(Struct, frozen=True, kw_only=True):
    """Which GPUs the hive uses, by index or uuid: only those in `use` (None: all), and none in `ignore`."""

    use: tuple[int | str, ...] | None = None
    ignore: tuple[int | str, ...] = ()

    def takes(self, index: int, names: Collection[str]) -> bool:
        """Whether the hive uses a GPU. `names`: its uuid, and of a slice its GPU's too."""

        def is_named(chosen: Sequence[int | str]) -> bool:
            return index in chosen or any(name in chosen for name in names)

        return (self.use is None or is_named(self.use)) and not is_named(self.ignore)

    def not_among(self, readings: Sequence[GpuReading]) -> list[int | str]:
        """Give what is named here and not there."""
        there: set[int | str | None] = {reading.index for reading in readings}
        there |= {reading.uuid for reading in readings} | {reading.parent for reading in readings}
        return [name for name in (*(self.use or ()), *self.ignore) if name not in there]


class Devices:
    """Reads the devices' state. NVML is opened once; a machine without it has the CPU only.

    A GPU has NVML's index, which is the PCI order. MIG slices are numbered after the GPUs, in the order in
    which they were first seen, and keep their number; a slice that is gone is listed as failed.
    """

    def __init__(
        self,
        nvml: Nvml | None = None,
        choice: DeviceChoice | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml: Nvml = RealNvml() if nvml is None else nvml
        self._choice = choice or DeviceChoice()
        self._clock = clock
        self._is_open = False
        self._why_no_nvml: str | None = "it was not opened"
        self._gpu_indexes = 0
        self._slices: dict[str, tuple[int, Device]] = {}
        self._xids: dict[str, Counter[int]] = {}
        self._watch: _XidWatch | None = None
        self._lock = threading.Lock()
        self._last: list[Device] = []
        self._read_at = -float("inf")

    def open(self) -> None:
        """Connect to NVML, if it is there, and listen for Xids."""
        try:
            self._nvml.open()
        except NvmlUnavailable as exc:
            self._why_no_nvml = str(exc)
            log.info("no_nvml", reason=str(exc))
            return
        self._is_open, self._why_no_nvml = True, None
        readings = self._nvml.read()
        self._gpu_indexes = max((reading.index for reading in readings), default=-1) + 1
        for name in self._choice.not_among(readings):
            log.warning("no_such_gpu", name=name, there=[reading.uuid for reading in readings])
        self._watch = _XidWatch(self._nvml, self.note_xid)
        self._watch.start()

    def close(self) -> None:
        """Disconnect; a second time changes nothing."""
        if not self._is_open:
            return
        self._is_open = False
        if self._watch is not None and not self._watch.stop():
            return  # NVML hangs; what it is in must not be taken from under it
        self._nvml.close()

    @property
    def driver(self) -> str | None:
        """The GPU driver's version; None without one."""
        return self._nvml.driver if self._is_open else None

    @property
    def cuda(self) -> str | None:
        """The newest CUDA that the driver runs, as `12.8`; None without a driver."""
        return self._nvml.cuda if self._is_open else None

    @property
    def why_no_nvml(self) -> str | None:
        """Why the GPUs cannot be told; None where they can."""
        return self._why_no_nvml

    @property
    def gpu_count(self) -> int:
        """How many GPUs and slices work."""
        return len(self.working_gpus)

    @property
    def working_gpus(self) -> list[int]:
        """The indexes of the GPUs and slices that can be used, as of the newest reading."""
        return [device.index for device in self.last if device.kind == "cuda" and device.health != "failed"]

    @property
    def last(self) -> list[Device]:
        """The newest reading, without a wait for the devices; the first one is made here."""
        return self._last or self.read()

    def read(self) -> list[Device]:
        """Give every device as it is now, GPUs first. Takes some milliseconds for each GPU."""
        with self._lock:
            if self._clock() - self._read_at >= READ_AGAIN_AFTER_S or not self._last:
                gpus = self._gpus(self._nvml.read()) if self._is_open else []
                self._last = [*gpus, read_cpu()]
                self._read_at = self._clock()
            return self._last

    def note_xid(self, uuid: str, code: int) -> None:
        """Take in that the driver has reported an error of a GPU."""
        self._xids.setdefault(uuid, Counter())[code] += 1
        log.log(20 if code in OF_PROGRAMS else 40, "gpu_xid", gpu=uuid, xid=code)

    def _gpus(self, readings: Sequence[GpuReading]) -> list[Device]:
        listed = []
        present = set()
        for reading in readings:
            names = {reading.uuid} if reading.parent is None else {reading.uuid, reading.parent}
            if not self._choice.takes(reading.index, names):
                continue
            present.add(reading.uuid)
            device = self._device(reading)
            if reading.parent is not None:
                self._slices[reading.uuid] = (device.index, device)
            listed.append(device)
        gone = [device for uuid, (_, device) in self._slices.items() if uuid not in present]
        listed += [_gone(device) for device in gone]
        return sorted(listed, key=lambda device: device.index)

    def _device(self, reading: GpuReading) -> Device:
        index = reading.index
        if reading.parent is not None:
            known = self._slices.get(reading.uuid)
            index = known[0] if known else self._gpu_indexes + len(self._slices)
        judgement = judge(reading, self._xids.get(reading.parent or reading.uuid, {}))
        return Device(
            kind="cuda",
            index=index,
            name=reading.name,
            uuid=reading.uuid,
            memory_total=reading.memory_total,
            memory_used=reading.memory_used,
            utilization=reading.utilization,
            temperature=reading.temperature,
            power=reading.power,
            driver=self._nvml.driver,
            processes=list(reading.processes),
            health=judgement.health,
            issues=judgement.issues,
            mig_uuid=reading.parent,
        )


class _XidWatch(threading.Thread):
    """Waits for Xids, which NVML tells by an event and never again."""

    def __init__(self, nvml: Nvml, on_xid: Callable[[str, int], None]) -> None:
        super().__init__(name="xid-watch", daemon=True)
        self._nvml = nvml
        self._on_xid = on_xid
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            xid = self._nvml.wait_xid(XID_WAIT_S)
            if xid is not None:
                self._on_xid(xid.uuid, xid.code)
            elif time.monotonic() - began < XID_WAIT_S / 2:
                self._stopping.wait(XID_PAUSE_S)  # it cannot tell any: do not ask without a pause

    def stop(self) -> bool:
        """Wait for no more; False when NVML does not come back."""
        self._stopping.set()
        self.join(XID_STOP_S)
        return not self.is_alive()


def visible(devices: Sequence[Device], indexes: Sequence[int]) -> str:
    """Give `CUDA_VISIBLE_DEVICES` for GPUs of this hive, beside `CUDA_DEVICE_ORDER=PCI_BUS_ID`.

    A whole GPU is named by its index, which every version of vLLM reads; CUDA knows a MIG slice by its uuid
    only.
    """
    slices = {device.index: device.uuid for device in devices if device.kind == "cuda" and device.mig_uuid}
    return ",".join(slices.get(index) or str(index) for index in indexes)


def totals(devices: Sequence[Device]) -> dict[DeviceKey, int]:
    """Give the memory of each device on which something can be promised: those that work and tell it."""
    return {
        (device.kind, device.index): device.memory_total
        for device in devices
        if device.memory_total is not None and device.health != "failed"
    }


def with_promises(
    devices: Sequence[Device], reservations: Reservations, owners: Mapping[int, str]
) -> list[Device]:
    """Give the devices with what is promised on them, and whose worker each process on them is.

    Args:
        owners: the worker of each process id that is known to be a worker's.
    """
    return [
        structs.replace(
            device,
            memory_reserved=reservations.reserved((device.kind, device.index)),
            memory_kept_free=reservations.kept_free((device.kind, device.index)),
            processes=[
                structs.replace(process, worker_id=owners.get(process.pid)) for process in device.processes
            ],
        )
        for device in devices
    ]


def _gone(device: Device) -> Device:
    return Device(
        kind="cuda",
        index=device.index,
        name=device.name,
        uuid=device.uuid,
        mig_uuid=device.mig_uuid,
        driver=device.driver,
        health="failed",
        issues=["The slice is gone: MIG was changed while the hive ran. Start the hive again."],
    )
