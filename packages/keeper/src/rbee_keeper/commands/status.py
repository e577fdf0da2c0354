"""`rbee status`: the whole cluster at a look."""

from contextlib import aclosing

import typer

from rbee_contracts.nodes import HiveHeartbeat, HiveInfo, StatusResult
from rbee_contracts.operations import Status
from rbee_keeper import render
from rbee_keeper.command import Call, command


def register(app: typer.Typer) -> None:
    @command(app, "status")
    async def status(call: Call) -> None:
        """Show the cluster: hives, devices, workers, models."""
        found = await (hive_status(call) if call.settings.is_hive else _queen_status(call))
        if call.out.json:
            call.out.document(found)
            return
        call.out.line(render.headline(found, call.settings))
        for grid in render.status(found, is_unicode=call.out.is_unicode):
            if call.out.to_person or grid.rows:
                call.out.line("")
                call.out.line(f"{grid.title}") if not call.out.to_person else None
                call.out.grid(grid)


async def _queen_status(call: Call) -> StatusResult:
    from rbee_keeper.client import perform

    async with call.connect() as client:
        found: StatusResult = await perform(client, Status())
    return found


async def hive_status(call: Call) -> StatusResult:
    """Give the status of one hive as it tells it itself, in its next heartbeat.

    Raises:
        InvalidRequest: what answers is no hive.
    """
    from rbee_keeper.hives import own_id

    async with call.connect() as client:
        await own_id(client, call.settings)
        async with aclosing(client.heartbeats("follower=keeper", HiveHeartbeat)) as beats:
            beat = await anext(beats)
    hive = HiveInfo(
        hive_id=beat.hive_id,
        url=call.settings.url,
        state="online",
        version=beat.version,
        last_seen_s=0.0,
        devices=beat.devices,
        workers=beat.workers,
        models=beat.models,
        draining=beat.draining,
        disk=beat.disk,
        labels=beat.labels,
        boot=beat.boot,
    )
    return StatusResult(version=beat.version, uptime_s=beat.uptime_s, hives=[hive])
