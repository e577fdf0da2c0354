"""NVML in our words: what a GPU is and how it does, read through nvidia-ml-py.

`Nvml` is the seam to the outside world; `testing.FakeNvml` stands in for it, and both pass the same contract
test. Not every GPU tells everything: what it does not tell is None.
"""

import contextlib
import ctypes
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import pynvml
import structlog
from msgspec import Struct

from rbee_contracts.nodes import DeviceProcess

log = structlog.get_logger(__name__)

MAX_PROCESSES = 256
"""Processes of one GPU that are told at most; those with the most memory."""


class NvmlUnavailable(Exception):
    """There is no NVML here, or it does not work; the message is NVML's."""


class GpuReading(Struct, frozen=True, kw_only=True):
    """A GPU, or a MIG slice of one, at one moment. Bytes, percent, °C, W.

    Args:
        index: NVML's, which is the PCI order; of a slice, its GPU's.
        parent: the uuid of the GPU that a slice belongs to.
        lost: why NVML cannot reach it any more; only its identity is right then.
        ecc_uncorrected: memory errors since the driver was loaded that could not be mended.
        repair_pending: a page or row of memory is replaced at the next reset.
        repair_failed: one could not be replaced.
        slowdown: NVML's bits that say why the clocks are low.
        recovery: what the driver says must be done with it, one of NVML's recovery actions.
        without_slices: it is in MIG mode and no slice was made, so that nothing can use it.
    """

    index: int
    uuid: str
    name: str
    parent: str | None = None
    lost: str | None = None
    memory_total: int | None = None
    memory_used: int | None = None
    processes: tuple[DeviceProcess, ...] = ()
    utilization: float | None = None
    temperature: float | None = None
    power: float | None = None
    ecc_uncorrected: int | None = None
    repair_pending: bool = False
    repair_failed: bool = False
    slowdown: int = 0
    recovery: int = 0
    without_slices: bool = False


class Xid(Struct, frozen=True, kw_only=True):
    """An error that the driver reported of a GPU; `uuid` is the whole GPU's also where a slice had it."""

    uuid: str
    code: int


class Nvml(Protocol):
    """What the hive needs of NVML. Calls block, some for milliseconds; `read` and `wait_xid` may overlap."""

    def open(self) -> None:
        """Connect. Raises `NvmlUnavailable`."""

    def close(self) -> None:
        """Disconnect; a second time changes nothing."""

    @property
    def driver(self) -> str | None:
        """The driver's version."""

    @property
    def cuda(self) -> str | None:
        """The newest CUDA that the driver runs, as `12.8`."""

    def read(self) -> list[GpuReading]:
        """Give every GPU in PCI order, one in MIG mode as its slices. Never raises: what is lost says so."""

    def wait_xid(self, timeout_s: float) -> Xid | None:
        """Wait for the next Xid; None when none came, or when they cannot be told here."""


class _Gpu(Struct):
    """A GPU that was there at the start, which keeps its place and identity whatever becomes of it."""

    index: int
    handle: Any
    uuid: str
    name: str


class RealNvml:
    """NVML through nvidia-ml-py.

    Args:
        library: stands in for pynvml in tests.
    """

    def __init__(self, library: ModuleType | Any = pynvml) -> None:
        self._nvml = library
        self._gpus: list[_Gpu] = []
        self._events: Any = None
        self._is_open = False
        self._driver: str | None = None
        self._cuda: str | None = None

    @property
    def driver(self) -> str | None:
        return self._driver

    @property
    def cuda(self) -> str | None:
        return self._cuda

    def open(self) -> None:
        try:
            self._nvml.nvmlInit()
        except pynvml.NVMLError as exc:
            raise NvmlUnavailable(str(exc)) from exc
        self._is_open = True
        try:
            self._driver = _text(self._nvml.nvmlSystemGetDriverVersion())
            version = self._tell(self._nvml.nvmlSystemGetCudaDriverVersion_v2)
            self._cuda = None if version is None else f"{version // 1000}.{version % 1000 // 10}"
            self._gpus = [self._identify(index) for index in range(int(self._nvml.nvmlDeviceGetCount()))]
        except pynvml.NVMLError as exc:
            self.close()
            raise NvmlUnavailable(str(exc)) from exc
        self._events = self._register()

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        with contextlib.suppress(pynvml.NVMLError):
            if self._events is not None:
                self._nvml.nvmlEventSetFree(self._events)
        self._events = None
        with contextlib.suppress(pynvml.NVMLError):
            self._nvml.nvmlShutdown()

    def read(self) -> list[GpuReading]:
        return [reading for gpu in self._gpus for reading in self._read(gpu)]

    def wait_xid(self, timeout_s: float) -> Xid | None:
        if self._events is None:
            return None
        try:
            event = self._nvml.nvmlEventSetWait_v2(self._events, int(timeout_s * 1000))
        except pynvml.NVMLError_Timeout:
            return None
        except pynvml.NVMLError as exc:
            # It would say so at once, again and again.
            log.warning("xids_not_told", reason=str(exc))
            self._events = None
            return None
        if event.eventType != pynvml.nvmlEventTypeXidCriticalError:
            return None
        address = _address(event.device)
        uuid = next((gpu.uuid for gpu in self._gpus if _address(gpu.handle) == address), None)
        return None if uuid is None else Xid(uuid=uuid, code=int(event.eventData))

    # --- one GPU ---------------------------------------------------------------------------------------

    def _identify(self, index: int) -> _Gpu:
        try:
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            name = _text(self._nvml.nvmlDeviceGetName(handle))
            return _Gpu(index, handle, _text(self._nvml.nvmlDeviceGetUUID(handle)), name)
        except pynvml.NVMLError as exc:
            # Fallen off the bus before the hive started: it has no name to be called by.
            log.warning("gpu_lost", index=index, reason=str(exc))
            return _Gpu(index, None, f"unknown-{index}", "unknown GPU")

    def _read(self, gpu: _Gpu) -> list[GpuReading]:
        if gpu.handle is None:
            return [_lost(gpu, "it could not be reached when the hive started")]
        try:
            # The one call that every GPU answers, so that its failure tells that the GPU is gone.
            self._nvml.nvmlDeviceGetUUID(gpu.handle)
            memory = self._tell(self._nvml.nvmlDeviceGetMemoryInfo, gpu.handle)
            whole = self._whole(gpu, memory)
            mode = self._tell(self._nvml.nvmlDeviceGetMigMode, gpu.handle)
            if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
                return [whole]
            return self._slices(gpu, whole) or [_with(whole, without_slices=True)]
        except pynvml.NVMLError as exc:
            return [_lost(gpu, str(exc))]

    def _whole(self, gpu: _Gpu, memory: Any) -> GpuReading:
        tell, nvml, handle = self._tell, self._nvml, gpu.handle
        rates = tell(nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = tell(nvml.nvmlDeviceGetPowerUsage, handle)
        rows = tell(nvml.nvmlDeviceGetRemappedRows, handle)
        pages_pending = tell(nvml.nvmlDeviceGetRetiredPagesPendingStatus, handle)
        ecc = tell(
            nvml.nvmlDeviceGetTotalEccErrors,
            handle,
            pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            pynvml.NVML_VOLATILE_ECC,
        )
        return GpuReading(
            index=gpu.index,
            uuid=gpu.uuid,
            name=gpu.name,
            memory_total=None if memory is None else int(memory.total),
            memory_used=None if memory is None else int(memory.used),
            processes=self._processes(handle),
            utilization=None if rates is None else float(rates.gpu),
            temperature=_float(tell(nvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)),
            power=None if milliwatts is None else milliwatts / 1000,
            ecc_uncorrected=None if ecc is None else int(ecc),
            repair_pending=bool(pages_pending) or bool(rows and rows[2]),
            repair_failed=bool(rows and rows[3]),
            slowdown=int(tell(self._slowdown_call(), handle) or 0),
            recovery=self._recovery(handle),
        )

    def _slices(self, gpu: _Gpu, whole: GpuReading) -> list[GpuReading]:
        nvml = self._nvml
        slices = []
        for place in range(int(self._tell(nvml.nvmlDeviceGetMaxMigDeviceCount, gpu.handle) or 0)):
            handle = self._tell(nvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu.handle, place)
            uuid = None if handle is None else self._tell(nvml.nvmlDeviceGetUUID, handle)
            if uuid is None:
                continue  # places of slices that were not made
            memory = self._tell(nvml.nvmlDeviceGetMemoryInfo, handle)
            name = self._tell(nvml.nvmlDeviceGetName, handle)
            slices.append(
                _with(
                    whole,
                    uuid=_text(uuid),
                    name=gpu.name if name is None else _text(name),
                    parent=gpu.uuid,
                    memory_total=None if memory is None else int(memory.total),
                    memory_used=None if memory is None else int(memory.used),
                    processes=self._processes(handle),
                    utilization=None,  # NVML tells it of whole GPUs only
                )
            )
        return slices

    def _processes(self, handle: Any) -> tuple[DeviceProcess, ...]:
        """One process may stand in both lists, then with the same memory."""
        used: dict[int, int | None] = {}
        for call in (
            self._nvml.nvmlDeviceGetComputeRunningProcesses_v3,
            self._nvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
        ):
            for process in self._tell(call, handle) or []:
                pid, memory = int(process.pid), process.usedGpuMemory
                before = used.get(pid)
                used[pid] = before if memory is None else max(int(memory), before or 0)
        listed = [DeviceProcess(pid=pid, memory=memory) for pid, memory in used.items()]
        listed.sort(key=lambda process: (-(process.memory or 0), process.pid))
        return tuple(listed[:MAX_PROCESSES])

    def _recovery(self, handle: Any) -> int:
        field = pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
        values = self._tell(self._nvml.nvmlDeviceGetFieldValues, handle, [field])
        if values is None or values[0].nvmlReturn != pynvml.NVML_SUCCESS:
            return 0
        return int(values[0].value.uiVal)

    def _slowdown_call(self) -> Callable[..., Any]:
        name = "nvmlDeviceGetCurrentClocksEventReasons"
        older = "nvmlDeviceGetCurrentClocksThrottleReasons"
        call: Callable[..., Any] = getattr(self._nvml, name, None) or getattr(self._nvml, older)
        return call

    def _register(self) -> Any:
        """Ask for Xids of every GPU that tells them; None where none does."""
        try:
            events = self._nvml.nvmlEventSetCreate()
        except pynvml.NVMLError as exc:
            log.info("xids_not_told", reason=str(exc))
            return None
        registered = 0
        for gpu in self._gpus:
            try:
                if gpu.handle is not None:
                    self._nvml.nvmlDeviceRegisterEvents(
                        gpu.handle, pynvml.nvmlEventTypeXidCriticalError, events
                    )
                    registered += 1
            except pynvml.NVMLError as exc:
                log.info("xids_not_told", gpu=gpu.uuid, reason=str(exc))
        if registered:
            return events
        with contextlib.suppress(pynvml.NVMLError):
            self._nvml.nvmlEventSetFree(events)
        return None

    def _tell(self, call: Callable[..., Any], *args: Any) -> Any:
        """Read what not every GPU, nor every driver, can tell; None where it does not.

        Raises:
            pynvml.NVMLError: the GPU is lost, or must be reset before it answers again.
        """
        try:
            return call(*args)
        except (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired):
            raise
        except pynvml.NVMLError:
            return None


def _lost(gpu: _Gpu, reason: str) -> GpuReading:
    return GpuReading(index=gpu.index, uuid=gpu.uuid, name=gpu.name, lost=reason)


def _with(reading: GpuReading, **changes: Any) -> GpuReading:
    values = {name: getattr(reading, name) for name in reading.__struct_fields__}
    return GpuReading(**(values | changes))


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
