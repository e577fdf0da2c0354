"""`rbee status` and the lists of hives, models and devices."""

import asyncio

import msgspec
import typer

from rbee_contracts.nodes import HiveInfo, ServiceInfo, StatusResult
from rbee_contracts.operations import DeviceList, HiveList, HiveOperation, ModelList, Status, WorkerList
from rbee_keeper import render
from rbee_keeper.command import Call, HiveIdOption, command


def register_status(app: typer.Typer) -> None:
    @command(app, "status")
    async def status(call: Call) -> None:
        """Show the cluster: hives, devices, workers, models."""
        found = await (_hive_status(call) if call.settings.is_hive else _queen_status(call))
        if call.out.json:
            call.out.document(found)
            return
        call.out.line(render.headline(found, call.settings))
        for grid in render.status(found):
            if call.out.to_person or grid.rows:
                call.out.line("")
                call.out.line(f"{grid.title}") if not call.out.to_person else None
                call.out.grid(grid)


def register_lists(app: typer.Typer) -> None:
    hives = typer.Typer(help="Look at the hives.", no_args_is_help=True)
    models = typer.Typer(help="Look at the models on the hives.", no_args_is_help=True)
    devices = typer.Typer(help="Look at the hives' devices.", no_args_is_help=True)
    app.add_typer(hives, name="hive")
    app.add_typer(models, name="model")
    app.add_typer(devices, name="device")

    @command(hives, "list")
    async def hive_list(call: Call) -> None:
        """List the hives that the queen knows."""
        from rbee_keeper.client import perform

        async with call.connect() as client:
            found = await perform(client, HiveList())
        if call.out.json:
            call.out.document(found)
        else:
            call.out.grid(render.hives(found.hives))

    @command(models, "list")
    async def model_list(call: Call, *, hive_id: HiveIdOption = None) -> None:
        """List the models that lie on the hives."""
        await _list(call, ModelList(hive_id=hive_id))

    @command(devices, "list")
    async def device_list(call: Call, *, hive_id: HiveIdOption = None) -> None:
        """List the devices of the hives."""
        await _list(call, DeviceList(hive_id=hive_id))


async def _list(call: Call, operation: ModelList | DeviceList) -> None:
    """Show what each hive has, in one table."""
    from rbee_keeper.client import ask_hives

    async with call.connect() as client:
        results, silent = await ask_hives(client, call.settings, operation)
    name = "models" if isinstance(operation, ModelList) else "devices"
    found = [(hive, item) for hive, result in results.items() for item in getattr(result, name)]
    if call.out.json:
        call.out.document({name: [msgspec.to_builtins(item) | {"hive_id": hive} for hive, item in found]})
    else:
        call.out.grid(render.models(found) if isinstance(operation, ModelList) else render.devices(found))
    render.tell_silent(call.out, silent)


async def _queen_status(call: Call) -> StatusResult:
    from rbee_keeper.client import perform

    async with call.connect() as client:
        found: StatusResult = await perform(client, Status())
    return found


async def _hive_status(call: Call) -> StatusResult:
    """Put the status of one hive together from what it can tell itself."""
    from rbee_keeper.client import perform

    asked: list[HiveOperation] = [DeviceList(), WorkerList(), ModelList()]
    async with call.connect() as client:
        info: ServiceInfo = await client.get_json("/v1/info", ServiceInfo)
        devices, workers, models = await asyncio.gather(*(perform(client, op) for op in asked))
    hive = HiveInfo(
        hive_id=info.id,
        url=call.settings.url,
        state="online",
        version=info.version,
        last_seen_s=0.0,
        devices=devices.devices,
        workers=workers.workers,
        models=models.models,
    )
    return StatusResult(version=info.version, uptime_s=info.uptime_s, hives=[hive])
