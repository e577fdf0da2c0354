"""What the scheduler sees: plain values, taken at one moment."""

from msgspec import Struct

from rbee_contracts.nodes import HiveState, WorkerState


class WorkerView(Struct, frozen=True, kw_only=True):
    """One worker. `reported` requests stood in its hive's last heartbeat; `assigned` are this queen's own."""

    hive_id: str
    worker_id: str
    model: str
    state: WorkerState
    hive_state: HiveState
    is_hive_draining: bool = False
    reported: int
    assigned: int


class Snapshot(Struct, frozen=True, kw_only=True):
    workers: tuple[WorkerView, ...]


class Tried(Struct, frozen=True, kw_only=True):
    """Where this request failed before it spoke; without `worker_id` it was the hive that failed."""

    hive_id: str
    worker_id: str | None
    cause: str


class Request(Struct, frozen=True, kw_only=True):
    """What must run. `hive_id` and `worker_id` pin it where given."""

    model: str
    hive_id: str | None = None
    worker_id: str | None = None
    tried: tuple[Tried, ...] = ()
