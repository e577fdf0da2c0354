"""One hive as the queen has it: the line to it, what it last told, and what the queen has sent it."""

from collections.abc import Callable
from datetime import UTC, datetime

import anyio

from rbee_contracts.nodes import HiveHeartbeat, HiveInfo, HiveState, WorkerInfo
from rbee_job_client import JobClient
from rbee_job_client.client import Timeouts
from rbee_job_server import Relay
from rbee_queen.fleet.identity import Holder, Incarnation
from rbee_queen.fleet.liveness import Life, known

READ_TIMEOUT_S = 20.0
"""Silence after which a stream of a hive is opened anew; a hive sends a ping on each every 15 s."""


class Hive:
    """One hive at one address. `Fleet` owns it; others read."""

    def __init__(
        self, hive_id: str, incarnation: Incarnation, version: str, now: float, token: str | None
    ) -> None:
        self.id = hive_id
        self.url = incarnation.url
        self.version = version
        self.client = JobClient(self.url, token=token, timeouts=Timeouts(read=READ_TIMEOUT_S))
        self.relay = Relay(service="hive", peer=hive_id, client=self.client)
        self.life: Life = known(incarnation.boot, now)
        self.heartbeat: HiveHeartbeat | None = None
        self.clock_ahead_s: float | None = None
        """By how much its clock is ahead of the queen's, the way here included. It decides nothing."""
        self.trouble: str | None = None
        """Why it was not heard when it was last tried; None while it is."""
        self.scope = anyio.CancelScope()
        self.assigned: dict[str, int] = {}
        self.beaten = anyio.Event()
        """Set, and replaced, at each heartbeat."""
        self.announced = anyio.Event()
        """Set, and replaced, when it announces itself while it is not heard: worth an attempt at once."""

    @property
    def boot(self) -> str:
        return self.life.boot

    @property
    def state(self) -> HiveState:
        return self.life.state

    @property
    def is_draining(self) -> bool:
        return self.heartbeat is not None and self.heartbeat.draining

    @property
    def holder(self) -> Holder:
        return Holder(Incarnation(self.url, self.boot), self.state)

    @property
    def workers(self) -> list[WorkerInfo]:
        """The workers that it last told of."""
        return self.heartbeat.workers if self.heartbeat is not None else []

    def worker(self, worker_id: str) -> WorkerInfo | None:
        return next((worker for worker in self.workers if worker.worker_id == worker_id), None)

    def take(self, beat: HiveHeartbeat) -> None:
        """Remember what it tells."""
        self.heartbeat = beat
        self.version = beat.version
        self.clock_ahead_s = _ahead_s(beat.timestamp, datetime.now(UTC))
        self.beaten.set()
        self.beaten = anyio.Event()

    def call(self) -> None:
        """Try to reach it now, whenever the next attempt would be."""
        self.announced.set()
        self.announced = anyio.Event()

    async def until(self, is_seen: Callable[["Hive"], bool], timeout_s: float) -> None:
        """Wait, for so long at most, until its heartbeats show something."""
        with anyio.move_on_after(timeout_s):
            while not is_seen(self):
                await self.beaten.wait()

    def info(self, now: float) -> HiveInfo:
        beat = self.heartbeat
        return HiveInfo(
            hive_id=self.id,
            url=self.url,
            state=self.state,
            version=self.version,
            last_seen_s=round(self.life.silence_s(now), 1),
            devices=beat.devices if beat else [],
            workers=self.workers,
            models=beat.models if beat else [],
            draining=self.is_draining,
            disk=beat.disk if beat else None,
            labels=beat.labels if beat else {},
            boot=self.boot,
        )


def _ahead_s(timestamp: str, now: datetime) -> float | None:
    """Seconds from `now` to a time that a hive told; None where it is none."""
    try:
        told = datetime.fromisoformat(timestamp)
    except ValueError:
        return None
    return None if told.tzinfo is None else round((told - now).total_seconds(), 3)
