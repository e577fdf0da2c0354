"""What a heartbeat tells, put together from parts that are each read by themselves.

A reading of the devices or of the disk may take long, or never end (a driver that hangs, a network disk
that is gone). So each has a thread of its own and is told with its newest value; the others go on.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import anyio
import structlog

from rbee_contracts.nodes import Device, Disk, HiveHeartbeat, ModelInfo, WorkerInfo
from rbee_hive import VERSION
from rbee_hive.devices import Reservations, resident_memory, with_promises, worker_memory
from rbee_job_server.clock import Clock, SystemClock

log = structlog.get_logger(__name__)

READ_EVERY_S = 1.0

FIRST_READING_S = 5.0
"""How long the first heartbeat waits for all parts; what is not there by then is told empty."""

FIRST_LOOK_S = 0.02

T = TypeVar("T")


class DeviceSource(Protocol):
    """What a heartbeat needs of the devices."""

    def read(self) -> list[Device]: ...


class ModelSource(Protocol):
    """What a heartbeat needs of the models; both calls come from a thread."""

    def find(self) -> list[ModelInfo]: ...

    def disk(self) -> Disk: ...

    def with_users(self, info: ModelInfo, users: Mapping[str, Sequence[str]]) -> ModelInfo: ...

    @property
    def users(self) -> Callable[[], Mapping[str, Sequence[str]]]: ...


class WorkerSource(Protocol):
    """What a heartbeat needs of the workers; called on the event loop."""

    draining: bool

    def infos(self) -> list[WorkerInfo]: ...

    def owners(self) -> Mapping[int, str]: ...

    def note_memory(self, used: Mapping[str, int | None]) -> None: ...


class Reading(threading.Thread, Generic[T]):
    """Reads one part of the heartbeat again and again; `value` is the newest.

    A reading that fails leaves the value and is logged once for each cause. The thread does not keep the
    process from ending, as a reading may never come back.
    """

    def __init__(self, part: str, read: Callable[[], T], first: T, every_s: float) -> None:
        super().__init__(name=f"reading {part}", daemon=True)
        self.value = first
        self.has_read = threading.Event()
        self._part = part
        self._read = read
        self._every_s = every_s
        self._stopping = threading.Event()

    def run(self) -> None:
        failure: str | None = None
        due = time.monotonic()
        while not self._stopping.is_set():
            try:
                self.value = self._read()
                failure = None
            except Exception as exc:
                if repr(exc) != failure:
                    failure = repr(exc)
                    log.warning("reading_failed", part=self._part, error=failure)
            self.has_read.set()
            due = max(due + self._every_s, time.monotonic())
            self._stopping.wait(due - time.monotonic())

    def stop(self) -> None:
        """Read no more. Does not wait for a reading that is under way."""
        self._stopping.set()


class Telemetry:
    """Puts heartbeats together. `start` it before, `stop` it after.

    Args:
        is_sim: workers take no device memory whatever device they play.
        first_reading_s: how long `start` waits for a first value of every part.
    """

    def __init__(
        self,
        *,
        hive_id: str,
        labels: Mapping[str, str],
        workers: WorkerSource,
        devices: DeviceSource,
        models: ModelSource,
        reservations: Reservations,
        is_sim: bool = False,
        read_every_s: float = READ_EVERY_S,
        first_reading_s: float = FIRST_READING_S,
        clock: Clock | None = None,
    ) -> None:
        self._hive_id = hive_id
        self._labels = dict(labels)
        self._workers = workers
        self._models = models
        self._reservations = reservations
        self._is_sim = is_sim
        self._first_reading_s = first_reading_s
        self._clock = clock or SystemClock()
        self._started = self._clock.monotonic()
        self._device_part: Reading[list[Device]] = Reading("devices", devices.read, [], read_every_s)
        self._model_part: Reading[list[ModelInfo]] = Reading("models", models.find, [], read_every_s)
        self._disk_part: Reading[Disk | None] = Reading("disk", models.disk, None, read_every_s)
        self._ram_users: Mapping[str, set[int]] = {}
        """Process ids by worker, of those whose RAM is measured; replaced whole, as a thread reads it."""
        self._ram_part: Reading[dict[str, int | None]] = Reading(
            "memory", self._measure_ram, {}, read_every_s
        )
        self._parts = (self._device_part, self._model_part, self._disk_part, self._ram_part)

    async def start(self) -> None:
        """Begin to read, and wait a little for the first values."""
        self._note_memory([])
        for part in self._parts:
            part.start()
        with anyio.move_on_after(self._first_reading_s):
            while not all(part.has_read.is_set() for part in self._parts):  # noqa: ASYNC110 (threads)
                await anyio.sleep(FIRST_LOOK_S)

    def stop(self) -> None:
        """Read no more."""
        for part in self._parts:
            part.stop()

    def devices(self) -> list[Device]:
        """Give the devices as of the newest reading, with what is promised on them and to whom."""
        return with_promises(self._device_part.value, self._reservations, self._workers.owners())

    @property
    def disk(self) -> Disk | None:
        """The disk of the models folder as of the newest reading; None before the first."""
        return self._disk_part.value

    @property
    def models(self) -> int:
        """How many models lay here at the newest reading."""
        return len(self._model_part.value)

    def heartbeat(self, boot: str) -> HiveHeartbeat:
        """Tell how the hive is now. Waits for nothing.

        Args:
            boot: new at every start of the hive.
        """
        devices = self.devices()
        self._note_memory(devices)
        users = self._models.users()
        return HiveHeartbeat(
            hive_id=self._hive_id,
            boot=boot,
            version=VERSION,
            timestamp=self._clock.timestamp(),
            devices=devices,
            workers=self._workers.infos(),
            models=[self._models.with_users(info, users) for info in self._model_part.value],
            draining=self._workers.draining,
            disk=self._disk_part.value,
            labels=self._labels,
            uptime_s=round(self._clock.monotonic() - self._started, 3),
        )

    def _measure_ram(self) -> dict[str, int | None]:
        return {worker_id: resident_memory(pids) for worker_id, pids in self._ram_users.items()}

    def _note_memory(self, devices: Sequence[Device]) -> None:
        """Tell the workers what they use: of their GPUs by NVML, else of the RAM, as last measured."""
        pids: dict[str, set[int]] = {}
        for pid, worker_id in self._workers.owners().items():
            pids.setdefault(worker_id, set()).add(pid)
        measured = self._ram_part.value
        ram_users: dict[str, set[int]] = {}
        used: dict[str, int | None] = {}
        for info in self._workers.infos():
            own = pids.get(info.worker_id, set())
            if info.worker == "cuda" and not self._is_sim:
                used[info.worker_id] = worker_memory(own, devices, info.devices)
            else:
                ram_users[info.worker_id] = own
                used[info.worker_id] = measured.get(info.worker_id)
        self._ram_users = ram_users
        self._workers.note_memory(used)
