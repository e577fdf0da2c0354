"""Making the hive known: its heartbeat every second, its announcement while no queen follows."""

from datetime import UTC, datetime

import anyio
import anyio.to_thread
import structlog

from rbee_contracts.errors import RbeeError
from rbee_contracts.nodes import HiveHeartbeat, HiveReady
from rbee_hive import VERSION
from rbee_hive.config import HiveConfig
from rbee_hive.devices import Devices
from rbee_hive.models import Models
from rbee_hive.workers import Workers
from rbee_job_client import JobClient
from rbee_job_server.beats import BEAT_EVERY_S, Beats

log = structlog.get_logger(__name__)

ANNOUNCE_EVERY_S = 2.0


class Presence:
    """What others see of this hive. `queens` counts the queens that follow it now."""

    def __init__(
        self, config: HiveConfig, boot: str, workers: Workers, devices: Devices, models: Models
    ) -> None:
        self.beats = Beats()
        self.queens = 0
        self._config = config
        self._boot = boot
        self._workers = workers
        self._devices = devices
        self._models = models
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")

    async def beat(self) -> None:
        """Publish a heartbeat every second, and at once when a worker changes, for ever."""
        while True:
            changed = self._workers.changed
            devices = await anyio.to_thread.run_sync(self._devices.read)
            models = await anyio.to_thread.run_sync(self._models.find)
            self.beats.publish(
                HiveHeartbeat(
                    hive_id=self._config.hive_id,
                    boot=self._boot,
                    version=VERSION,
                    timestamp=datetime.now(UTC).isoformat(timespec="milliseconds"),
                    devices=devices,
                    workers=self._workers.infos(),
                    models=models,
                )
            )
            with anyio.move_on_after(BEAT_EVERY_S):
                await changed.wait()

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
                await anyio.sleep(ANNOUNCE_EVERY_S)
