"""The machine's devices: what they are and how they do, and what of their memory is promised to whom."""

from rbee_hive.devices.allotment import SIM_WORKER_BYTES, LaunchMemory, launch_memory, plan, tensor_parallel
from rbee_hive.devices.estimate import EstimateUnknown
from rbee_hive.devices.machine import DeviceChoice, Devices, totals, visible, with_promises
from rbee_hive.devices.reservations import DeviceKey, Reservations
from rbee_hive.devices.usage import foreign_memory, resident_memory, worker_memory
from rbee_hive.devices.weights import ModelUnreadable

__all__ = [
    "SIM_WORKER_BYTES",
    "DeviceChoice",
    "DeviceKey",
    "Devices",
    "EstimateUnknown",
    "LaunchMemory",
    "ModelUnreadable",
    "Reservations",
    "foreign_memory",
    "launch_memory",
    "plan",
    "resident_memory",
    "tensor_parallel",
    "totals",
    "visible",
    "with_promises",
    "worker_memory",
]
