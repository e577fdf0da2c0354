"""Making the hive known: its heartbeat every second, its announcement while no queen follows it."""

import math
import random
from datetime import UTC, datetime

import anyio
import structlog

from rbee_contracts.errors import RbeeError
from rbee_contracts.nodes import HiveReady
from rbee_hive import VERSION
from rbee_hive.config import HiveConfig
from rbee_hive.supervisor.workers import Workers
from rbee_hive.telemetry import Telemetry
from rbee_job_client import JobClient
from rbee_job_server.beats import BEAT_EVERY_S, Beats

log = structlog.get_logger(__name__)

ANNOUNCE_EVERY_S = 2.0
"""The longest pause between two announcements. Half of it is chance, so that hives that were started together
do not speak together for ever."""

CHANGE_EVERY_S = 0.05
"""Workers that change one after another are told together, after so long."""


def next_due(due: float, now: float, every_s: float = BEAT_EVERY_S) -> float:
    """Give the first time after `now` that is `due`, or a whole number of periods after it."""
    return due + every_s * max(0, math.floor((now - due) / every_s) + 1)


class Presence:
    """What others see of this hive. `queens` counts the queens that follow it now."""

    def __init__(self, config: HiveConfig, boot: str, workers: Workers, telemetry: Telemetry) -> None:
        self.beats = Beats()
        self.queens = 0
        self._config = config
        self._boot = boot
        self._workers = workers
        self._telemetry = telemetry
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.last_beat = math.inf
        """When a heartbeat was last published, by the loop's clock."""

    async def beat(self) -> None:
        """Publish a heartbeat every second, and soon after a worker has changed, for ever.

        The seconds are counted from the start, so that what a heartbeat costs does not move the next one;
        one that was missed is left out.
        """
        try:
            await self._telemetry.start()
            due = anyio.current_time()
            while True:
                changed = self._workers.changed
                self.beats.publish(self._telemetry.heartbeat(self._boot))
                self.last_beat = now = anyio.current_time()
                due = next_due(due, now)
                with anyio.move_on_after(due - now) as until_due:
                    await changed.wait()
                if not until_due.cancelled_caught:
                    await anyio.sleep(CHANGE_EVERY_S)
        finally:
            self._telemetry.stop()

    async def announce(self, port: int) -> None:
        """Tell the queen that this hive is here, whenever no queen follows it, for ever."""
        if self._config.queen_url is None:
            await anyio.sleep_forever()
            return
        ready = HiveReady(
            hive_id=self._config.hive_id,
            boot=self._boot,
            started_at=self._started_at,
            version=VERSION,
            port=port,
        )
        told: str | None = None
        async with JobClient(self._config.queen_url, token=self._config.access.token) as queen:
            while True:
                if self.queens == 0:
                    try:
                        await queen.post_json("/v1/hive/ready", ready)
                        outcome = "announced"
                    except RbeeError as exc:
                        outcome = exc.details
                    if outcome != told:
                        log.info("queen_announced", queen_url=self._config.queen_url, outcome=outcome)
                        told = outcome
                await anyio.sleep(random.uniform(ANNOUNCE_EVERY_S / 2, ANNOUNCE_EVERY_S))
