"""What must last: the queen's jobs, their narration, and the hives it knows."""

from rbee_queen.store.base import JobStore, StoreFailed, StoreState
from rbee_queen.store.records import (
    FirstOutput,
    HiveForgotten,
    HiveSeen,
    JobAccepted,
    JobEnded,
    JobStarted,
    Narrated,
    Record,
    StepTaken,
    StoredEvent,
    StoredHive,
    StoredJob,
    StoredStep,
)

__all__ = [
    "FirstOutput",
    "HiveForgotten",
    "HiveSeen",
    "JobAccepted",
    "JobEnded",
    "JobStarted",
    "JobStore",
    "Narrated",
    "Record",
    "StepTaken",
    "StoreFailed",
    "StoreState",
    "StoredEvent",
    "StoredHive",
    "StoredJob",
    "StoredStep",
]
