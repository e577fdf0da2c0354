"""`rbee worker`: start, list and stop workers."""

from typing import Annotated, Any, Literal

import msgspec
import typer

from rbee_contracts.errors import InvalidRequest, NotFound
from rbee_contracts.events import AnyEvent
from rbee_contracts.nodes import WorkerInfo
from rbee_contracts.operations import WorkerList, WorkerSpawn, WorkerStop, decode_operation
from rbee_keeper import render
from rbee_keeper.command import Call, HiveIdOption, command


def register(app: typer.Typer) -> None:
    workers = typer.Typer(help="Start, list and stop workers.", no_args_is_help=True)
    app.add_typer(workers, name="worker")

    @command(workers, "spawn")
    async def spawn(
        call: Call,
        *,
        model: Annotated[
            str, typer.Option("--model", "-m", metavar="MODEL", help="The model to load.", show_default=False)
        ],
        hive_id: HiveIdOption = None,
        device: Annotated[
            list[int] | None,
            typer.Option("--device", metavar="N", help="Index of a device; several share the model."),
        ] = None,
        worker: Annotated[
            Literal["cuda", "cpu"] | None,
            typer.Option("--worker", help="Kind of device (default: cuda where the hive has a GPU)."),
        ] = None,
        engine_args: Annotated[
            list[str] | None,
            typer.Argument(metavar="[-- ENGINE_ARGS...]", help="After --: options of vLLM, unchanged."),
        ] = None,
    ) -> None:
        """Load a model: start a worker and wait until it answers."""
        if engine_args and not engine_args[0].startswith("-"):
            raise typer.BadParameter(
                f"{engine_args[0]!r} is no option of the engine; these come after --, the model is --model"
            )
        asked: dict[str, Any] = {"operation": "worker_spawn", "model": model}
        asked |= {"worker_args": engine_args} if engine_args else {}
        asked |= {"hive_id": hive_id} if hive_id else {}
        asked |= {"worker": worker} if worker else {}
        asked |= {"devices": device} if device else {}
        try:
            operation = decode_operation(msgspec.json.encode(asked))
        except InvalidRequest as exc:
            raise typer.BadParameter(exc.details.removeprefix("worker_spawn: ")) from exc
        assert isinstance(operation, WorkerSpawn)

        from rbee_keeper.client import perform

        async with call.connect() as client:
            spawned = await perform(client, operation, _narrator(call), is_ours=True)
        if call.out.json:
            call.out.document(spawned)
        else:
            call.out.line(spawned.worker_id)

    @command(workers, "list")
    async def list_(call: Call, *, hive_id: HiveIdOption = None) -> None:
        """List the workers of all hives, or of one."""
        found, silent = await _workers(call, hive_id)
        if call.out.json:
            listed = [msgspec.to_builtins(worker) | {"hive_id": hive} for hive, worker in found]
            call.out.document({"workers": listed})
        else:
            call.out.grid(render.workers(found))
        render.tell_silent(call.out, silent)

    @command(workers, "stop")
    async def stop(
        call: Call,
        *,
        worker_id: Annotated[str, typer.Argument(metavar="WORKER_ID", show_default=False)],
        hive_id: HiveIdOption = None,
        grace_s: Annotated[
            float | None,
            typer.Option("--grace-s", metavar="S", min=0, help="Seconds for what runs on it (default: 30)."),
        ] = None,
    ) -> None:
        """Stop a worker; what runs on it may finish first."""
        from rbee_keeper.client import perform

        if hive_id is None:
            found, _ = await _workers(call, None)
            hives = [hive for hive, worker in found if worker.worker_id == worker_id]
            if not hives:
                known = ", ".join(worker.worker_id for _, worker in found) or "none"
                raise NotFound(f"No worker {worker_id!r}. Workers: {known}.", code="no_such_worker")
            hive_id = hives[0]
        asked: dict[str, Any] = {"operation": "worker_stop", "worker_id": worker_id, "hive_id": hive_id}
        asked |= {} if grace_s is None else {"grace_s": grace_s}
        try:
            operation = decode_operation(msgspec.json.encode(asked))
        except InvalidRequest as exc:
            raise typer.BadParameter(exc.details.removeprefix("worker_stop: ")) from exc
        assert isinstance(operation, WorkerStop)
        async with call.connect() as client:
            stopped = await perform(client, operation, _narrator(call))
        if call.out.json:
            call.out.document(stopped)


def _narrator(call: Call) -> Any:
    """Narrate on stderr, unless a program reads."""

    def show(event: AnyEvent) -> None:
        if event.kind == "narration" and event.action not in ("execute", "error") and not call.out.json:
            call.out.narrate(event)

    return show


async def _workers(call: Call, hive_id: str | None) -> tuple[list[tuple[str, WorkerInfo]], list[str]]:
    """Give the workers, each with its hive, and the hives that could not be asked."""
    from rbee_keeper.client import ask_hives

    async with call.connect() as client:
        results, silent = await ask_hives(client, call.settings, WorkerList(hive_id=hive_id))
    return [(hive, worker) for hive, result in results.items() for worker in result.workers], silent
