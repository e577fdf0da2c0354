"""A stand-in for pynvml's functions over GPUs that a test describes: what NVML answers, error by error."""

import ctypes
import time
from types import SimpleNamespace
from typing import Any

import pynvml


def nvml_error(code: int) -> pynvml.NVMLError:
    return pynvml.NVMLError(code)


class StubGpu:
    """One GPU or slice. `error`: what every call on it answers now; `silent`: what it cannot tell."""

    def __init__(self, uuid: str, **facts: Any) -> None:
        self.uuid = uuid
        self.error: int | None = None
        self.silent: set[str] = set()
        self.facts: dict[str, Any] = {
            "Name": "Stub GPU",
            "MemoryInfo": SimpleNamespace(total=80 << 30, used=1 << 30),
            "UtilizationRates": SimpleNamespace(gpu=12, memory=3),
            "Temperature": 41,
            "PowerUsage": 71_500,
            "TotalEccErrors": 0,
            "RemappedRows": (0, 0, 0, 0),
            "RetiredPagesPendingStatus": 0,
            "CurrentClocksEventReasons": 0,
            "MigMode": [0, 0],
            "ComputeRunningProcesses_v3": [],
            "GraphicsRunningProcesses_v3": [],
            "recovery": 0,
        } | facts
        self.slices: list[StubGpu] = []


class StubLibrary:
    """As much of pynvml as the hive calls."""

    def __init__(self, *gpus: StubGpu, init_error: int | None = None, has_events: bool = True) -> None:
        self.gpus = list(gpus)
        self.events: list[tuple[StubGpu, int, int]] = []
        self.calls: list[str] = []
        self._init_error = init_error
        self._has_events = has_events
        self._handles: dict[int, StubGpu] = {}

    def __getattr__(self, name: str) -> Any:
        prefix = "nvmlDeviceGet"
        if not name.startswith(prefix):
            raise AttributeError(name)

        def read(handle: ctypes.c_void_p, *_: Any) -> Any:
            gpu = self._of(handle)
            what = name.removeprefix(prefix)
            if what in gpu.silent or what not in gpu.facts:
                raise nvml_error(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return gpu.facts[what]

        return read

    def nvmlInit(self) -> None:
        if self._init_error is not None:
            raise nvml_error(self._init_error)

    def nvmlShutdown(self) -> None:
        self.calls.append("shutdown")

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.124.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12080

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> ctypes.c_void_p:
        error = self.gpus[index].error
        if error is not None:
            raise nvml_error(error)
        return self._handle(self.gpus[index])

    def nvmlDeviceGetUUID(self, handle: ctypes.c_void_p) -> str:
        return self._of(handle).uuid

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: ctypes.c_void_p) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: ctypes.c_void_p, index: int) -> ctypes.c_void_p:
        slices = self._of(handle).slices
        if index >= len(slices):
            raise nvml_error(pynvml.NVML_ERROR_NOT_FOUND)
        return self._handle(slices[index])

    def nvmlDeviceGetFieldValues(self, handle: ctypes.c_void_p, fields: list[int]) -> list[Any]:
        assert fields == [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        recovery = self._of(handle).facts["recovery"]
        code = pynvml.NVML_ERROR_NOT_SUPPORTED if recovery is None else pynvml.NVML_SUCCESS
        return [SimpleNamespace(nvmlReturn=code, value=SimpleNamespace(uiVal=recovery or 0))]

    def nvmlEventSetCreate(self) -> object:
        if not self._has_events:
            raise nvml_error(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return object()

    def nvmlDeviceRegisterEvents(self, handle: ctypes.c_void_p, types: int, events: object) -> None:
        assert types == pynvml.nvmlEventTypeXidCriticalError
        if "events" in self._of(handle).silent:
            raise nvml_error(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlEventSetWait_v2(self, events: object, timeout_ms: int) -> Any:
        if not self.events:
            time.sleep(min(timeout_ms / 1000, 0.01))
            raise nvml_error(pynvml.NVML_ERROR_TIMEOUT)
        gpu, kind, data = self.events.pop(0)
        return SimpleNamespace(device=self._handle(gpu), eventType=kind, eventData=data)

    def nvmlEventSetFree(self, events: object) -> None:
        self.calls.append("free")

    def _handle(self, gpu: StubGpu) -> ctypes.c_void_p:
        self._handles[id(gpu)] = gpu
        return ctypes.c_void_p(id(gpu))

    def _of(self, handle: ctypes.c_void_p) -> StubGpu:
        gpu = self._handles[handle.value or 0]
        if gpu.error is not None:
            raise nvml_error(gpu.error)
        return gpu
