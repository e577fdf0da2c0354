"""Device memory for workers: planned and promised before a process is started, for one at a time."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import anyio
import anyio.to_thread
from msgspec import Struct

from rbee_contracts.nodes import Device, MemoryEstimate
from rbee_hive.config import HiveConfig
from rbee_hive.devices import (
    SIM_WORKER_BYTES,
    LaunchMemory,
    Reservations,
    foreign_memory,
    plan,
    totals,
    visible,
)
from rbee_hive.devices.reservations import DeviceKey
from rbee_hive.supervisor.worker import Spec

CPU: DeviceKey = ("cpu", 0)


class DeviceReader(Protocol):
    """What the supervisor needs of the devices."""

    @property
    def working_gpus(self) -> list[int]: ...

    def read(self) -> list[Device]: ...


class Allotment(Struct, frozen=True, kw_only=True):
    """What a worker gets.

    Args:
        bytes_each: promised on each of its devices.
        arguments: the engine's, before the caller's own.
        visible: its GPUs, as `CUDA_VISIBLE_DEVICES`.
    """

    bytes_each: int
    arguments: tuple[str, ...]
    estimate: MemoryEstimate | None
    visible: str


class Allotter:
    """Promises workers their memory; `Reservations` keeps the promises.

    Args:
        owned: gives the process ids of all workers of this hive; what others use is not promised.
        environ: what workers inherit.
    """

    def __init__(
        self,
        config: HiveConfig,
        devices: DeviceReader,
        reservations: Reservations,
        owned: Callable[[], Awaitable[Collection[int]]],
        environ: Mapping[str, str],
    ) -> None:
        self._is_sim = config.worker_engine == "sim"
        self._devices = devices
        self._reservations = reservations
        self._owned = owned
        self._environ = environ
        self._turn = anyio.Lock()

    def gpus(self) -> dict[int, int]:
        """Give the GPUs that work, each with the bytes that can still be promised on it."""
        return {index: self._reservations.available(("cuda", index)) for index in self._devices.working_gpus}

    async def reserve(self, worker_id: str, spec: Spec, model_path: str) -> Allotment:
        """Decide what a worker takes of its devices, and promise it.

        Raises:
            NoCapacity: it is not there.
            InvalidRequest: an argument that decides on memory cannot be read.
            ModelUnreadable: the model's weights are damaged.
        """
        async with self._turn:
            read = await anyio.to_thread.run_sync(self._devices.read)
            self._take_in(read, await self._owned())
            keys: list[DeviceKey] = [CPU] if self._is_sim else [(spec.kind, index) for index in spec.devices]
            memory = await self._plan(spec, model_path, keys)
            self._reservations.reserve(worker_id, keys, memory.bytes_each)
            return Allotment(
                bytes_each=memory.bytes_each,
                arguments=tuple(memory.arguments),
                estimate=memory.estimate,
                visible=visible(read, spec.devices) if spec.kind == "cuda" else "",
            )

    def _take_in(self, devices: list[Device], owned: Collection[int]) -> None:
        foreign: dict[DeviceKey, int] = {
            (device.kind, device.index): foreign_memory(
                device, owned, self._reservations.reserved((device.kind, device.index))
            )
            for device in devices
            if device.kind == "cuda"
        }
        self._reservations.update(totals(devices), foreign)

    async def _plan(self, spec: Spec, model_path: str, keys: list[DeviceKey]) -> LaunchMemory:
        if self._is_sim:
            return LaunchMemory(bytes_each=SIM_WORKER_BYTES, arguments=[], estimate=None)

        def read_headers() -> LaunchMemory:
            return plan(
                Path(model_path),
                kind=spec.kind,
                device_count=len(spec.devices),
                worker_args=spec.args,
                total=min((self._reservations.total(key) for key in keys), default=0),
                available=min((self._reservations.available(key) for key in keys), default=0),
                environ=self._environ,
            )

        return await anyio.to_thread.run_sync(read_headers)

    def adopt(self, worker_id: str, spec: Spec, bytes_each: int) -> None:
        """Take in what an adopted worker has already."""
        keys: list[DeviceKey] = [CPU] if self._is_sim else [(spec.kind, index) for index in spec.devices]
        self._reservations.restore(worker_id, keys, bytes_each)

    def release(self, worker_id: str) -> None:
        self._reservations.release(worker_id)
