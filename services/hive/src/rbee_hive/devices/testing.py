"""A stand-in for NVML, with as many GPUs as a test wants. It passes the contract test of the real one."""

import queue
from typing import Any

from rbee_hive.devices.nvml import GpuReading, NvmlUnavailable, Xid

GIB = 1 << 30


def gpu(index: int = 0, **facts: Any) -> GpuReading:
    """Give a GPU with 80 GiB that does nothing; `facts` replace its readings."""
    idle: dict[str, Any] = {
        "uuid": f"GPU-{index:08d}",
        "name": "Test GPU",
        "memory_total": 80 * GIB,
        "memory_used": GIB // 2,
        "utilization": 0.0,
        "temperature": 30.0,
        "power": 70.0,
        "ecc_uncorrected": 0,
    }
    return GpuReading(index=index, **(idle | facts))


class FakeNvml:
    """NVML of a machine with these GPUs; `gpus` may be replaced while it is open.

    Args:
        unavailable: what `open` says instead of opening.
    """

    def __init__(self, *gpus: GpuReading, unavailable: str | None = None) -> None:
        self.gpus = list(gpus)
        self._unavailable = unavailable
        self._xids: queue.SimpleQueue[Xid] = queue.SimpleQueue()

    def open(self) -> None:
        if self._unavailable is not None:
            raise NvmlUnavailable(self._unavailable)

    def close(self) -> None:
        return None

    @property
    def driver(self) -> str | None:
        return "570.00"

    @property
    def cuda(self) -> str | None:
        return "12.8"

    def read(self) -> list[GpuReading]:
        return list(self.gpus)

    def report(self, uuid: str, code: int) -> None:
        """Report an Xid, as the driver would."""
        self._xids.put(Xid(uuid=uuid, code=code))

    def wait_xid(self, timeout_s: float) -> Xid | None:
        try:
            return self._xids.get(timeout=timeout_s)
        except queue.Empty:
            return None
