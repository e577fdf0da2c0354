"""Which worker was promised how much of which device's memory. The only place that promises any.

All changes are plain calls without a wait in between, made from one thread (the event loop), so that two
spawns cannot be promised the same bytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from rbee_contracts.errors import NoCapacity
from rbee_hive.devices.allotment import NO_DEVICE_MEMORY
from rbee_hive.devices.sizes import show_bytes

DeviceKey: TypeAlias = tuple[Literal["cuda", "cpu"], int]
"""Kind and index, as in `worker_spawn`."""


class Reservations:
    """Promises memory on devices, in bytes.

    What was promised on a device never exceeds its total less what is kept free there. What others than
    this hive's workers use of it (`update`) is not promised either.

    Args:
        kept_free: bytes that are never promised, by device; none where a device is not named.
    """

    def __init__(self, kept_free: Mapping[DeviceKey, int] | None = None) -> None:
        self._kept_free = dict(kept_free or {})
        self._totals: dict[DeviceKey, int] = {}
        self._foreign: dict[DeviceKey, int] = {}
        self._held: dict[str, dict[DeviceKey, int]] = {}

    def update(self, totals: Mapping[DeviceKey, int], foreign: Mapping[DeviceKey, int] | None = None) -> None:
        """Take in what is there now; a device that is not named can hold nothing more.

        Args:
            totals: bytes of each device that works.
            foreign: bytes in use by processes that are not this hive's workers.
        """
        self._totals = dict(totals)
        self._foreign = dict(foreign or {})

    def kept_free(self, device: DeviceKey) -> int:
        return self._kept_free.get(device, 0)

    def reserved(self, device: DeviceKey) -> int:
        """Give what is promised on a device, whether in use yet or not."""
        return sum(held.get(device, 0) for held in self._held.values())

    def available(self, device: DeviceKey) -> int:
        """Give what can be promised on a device now; never below 0."""
        total = self._totals.get(device, 0)
        taken = self.kept_free(device) + self.reserved(device) + self._foreign.get(device, 0)
        return max(0, total - taken)

    def total(self, device: DeviceKey) -> int:
        """Give a device's memory; 0 for one that is not there or does not work."""
        return self._totals.get(device, 0)

    def of(self, worker_id: str) -> int | None:
        """Give what a worker was promised on each of its devices; None for one without a promise."""
        held = self._held.get(worker_id)
        return max(held.values(), default=0) if held is not None else None

    def holders(self, device: DeviceKey) -> dict[str, int]:
        """Give who was promised how much on a device."""
        return {worker_id: held[device] for worker_id, held in self._held.items() if device in held}

    def reserve(self, worker_id: str, devices: Sequence[DeviceKey], bytes_each: int) -> None:
        """Promise a worker memory on each of its devices, or on none. Replaces what it had.

        Raises:
            NoCapacity: it is not there (`no_device_memory`); names the need, what is left and who has it.
        """
        before = self._held.pop(worker_id, None)
        for device in devices:
            if bytes_each > self.available(device):
                refusal = self._refusal(device, bytes_each)
                if before is not None:
                    self._held[worker_id] = before
                raise refusal
        self._held[worker_id] = dict.fromkeys(devices, bytes_each)

    def restore(self, worker_id: str, devices: Iterable[DeviceKey], bytes_each: int) -> None:
        """Take in what an adopted worker has already: it is in use, whatever is left."""
        self._held[worker_id] = dict.fromkeys(devices, bytes_each)

    def release(self, worker_id: str) -> None:
        """Take a worker's promise back; one without a promise changes nothing."""
        self._held.pop(worker_id, None)

    def _refusal(self, device: DeviceKey, needed: int) -> NoCapacity:
        kind, index = device
        total = self._totals.get(device)
        if total is None:
            return NoCapacity(
                f"{kind}:{index} cannot be used now: it does not tell its memory. See: rbee device list",
                code=NO_DEVICE_MEMORY,
                title="No device memory",
            )
        parts = [f"{show_bytes(size)} are promised to {who}" for who, size in self.holders(device).items()]
        if foreign := self._foreign.get(device, 0):
            parts.append(f"{show_bytes(foreign)} are used by processes that are not rbee's")
        if kept := self.kept_free(device):
            parts.append(f"{show_bytes(kept)} are kept free by the hive's configuration")
        free = show_bytes(self.available(device))
        return NoCapacity(
            f"The worker needs {show_bytes(needed)} on {kind}:{index}, where {free} of "
            f"{show_bytes(total)} are left"
            + (f": {', '.join(parts)}. " if parts else ". ")
            + "Stop a worker there, or give each less in its worker_args (--gpu-memory-utilization or "
            "--kv-cache-memory-bytes).",
            code=NO_DEVICE_MEMORY,
            title="No device memory",
        )
