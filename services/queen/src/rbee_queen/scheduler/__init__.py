"""Where a request runs, and why: a pure function in phases, filter then score."""

from rbee_queen.scheduler.schedule import NoPlacement, schedule
from rbee_queen.scheduler.snapshot import Request, Snapshot, Tried, WorkerView

__all__ = ["NoPlacement", "Request", "Snapshot", "Tried", "WorkerView", "schedule"]
