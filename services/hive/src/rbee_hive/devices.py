"""The machine's devices: GPUs by NVML where there is one, the CPU always."""

import contextlib
import platform
from typing import Any

import psutil
import pynvml
import structlog

from rbee_contracts.nodes import Device

log = structlog.get_logger(__name__)


class Devices:
    """Reads the devices' state. NVML is opened once; a machine without it has the CPU only."""

    def __init__(self) -> None:
        self._driver: str | None = None
        self._has_nvml = False

    def open(self) -> None:
        """Connect to NVML, if it is there."""
        try:
            pynvml.nvmlInit()
            self._driver = _text(pynvml.nvmlSystemGetDriverVersion())
            self._has_nvml = True
        except pynvml.NVMLError as exc:
            log.info("no_nvml", reason=str(exc))

    def close(self) -> None:
        if self._has_nvml:
            self._has_nvml = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    @property
    def gpu_count(self) -> int:
        return int(pynvml.nvmlDeviceGetCount()) if self._has_nvml else 0

    def read(self) -> list[Device]:
        """Give every device as it is now, GPUs first. Takes a few milliseconds."""
        return [*(self._gpu(index) for index in range(self.gpu_count)), _cpu()]

    def _gpu(self, index: int) -> Device:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = _or_none(pynvml.nvmlDeviceGetMemoryInfo, handle)
        rates = _or_none(pynvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = _or_none(pynvml.nvmlDeviceGetPowerUsage, handle)
        return Device(
            kind="cuda",
            index=index,
            name=_text(pynvml.nvmlDeviceGetName(handle)),
            uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
            memory_total=memory and int(memory.total),
            memory_used=memory and int(memory.used),
            utilization=rates and float(rates.gpu),
            temperature=_or_none(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
            power=milliwatts / 1000 if milliwatts is not None else None,
            driver=self._driver,
        )


def _cpu() -> Device:
    memory = psutil.virtual_memory()
    return Device(
        kind="cpu",
        index=0,
        name=platform.processor() or platform.machine(),
        memory_total=memory.total,
        memory_used=memory.total - memory.available,
        utilization=psutil.cpu_percent(),
        cores=psutil.cpu_count(),
    )


def _or_none(read: Any, *args: Any) -> Any:
    """Read what not every GPU can tell."""
    try:
        return read(*args)
    except pynvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
