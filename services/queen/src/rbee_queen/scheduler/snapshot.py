"""What the scheduler sees: plain values, taken at one moment."""

from msgspec import Struct

from rbee_contracts.nodes import WorkerState


class WorkerView(Struct, frozen=True, kw_only=True):
    """One worker. `reported` requests stood in its hive's last heartbeat; `assigned` are this queen's own."""

    hive_id: str
    worker_id: str
    model: str
    state: WorkerState
    is_hive_online: bool
    reported: int
    assigned: int


class Snapshot(Struct, frozen=True, kw_only=True):
    workers: tuple[WorkerView, ...]


class Request(Struct, frozen=True, kw_only=True):
    """What must run. `hive_id` and `worker_id` pin it where given."""

    model: str
    hive_id: str | None = None
    worker_id: str | None = None
