"""`rbee worker`: start, look at, drain and stop workers, and read their logs."""

from typing import Annotated, Literal

import msgspec
import typer

from rbee_contracts.operations import WorkerList, WorkerProcessList
from rbee_keeper import details, render
from rbee_keeper.command import (
    AllHivesOption,
    Call,
    HiveIdOption,
    OwnerOption,
    WorkerIdArgument,
    YesOption,
    checked,
    command,
    confirm,
)
from rbee_keeper.commands import listing
from rbee_keeper.telling import Teller


def register(app: typer.Typer) -> None:
    workers = typer.Typer(
        help="Start, look at, drain and stop workers; read their logs.", no_args_is_help=True
    )
    app.add_typer(workers, name="worker")
    _register_looking(workers)
    _register_changing(workers)
    _register_processes(workers)


def _register_looking(workers: typer.Typer) -> None:
    @command(workers, "list")
    async def list_(call: Call, *, hive_id: AllHivesOption = None) -> None:
        """List the workers of all hives, or of one."""
        found = await listing.gather(call, WorkerList(hive_id=hive_id), "workers")
        listing.show(call, "workers", found, render.workers(found))

    @command(workers, "show")
    async def show(call: Call, *, worker_id: WorkerIdArgument, hive_id: OwnerOption = None) -> None:
        """Show one worker: its state and how it came to it, what it does, and the memory it takes."""
        from rbee_keeper.client import perform

        hive_id = await _hive_of(call, worker_id, hive_id)
        async with call.connect() as client:
            worker = await perform(client, checked("worker_get", worker_id=worker_id, hive_id=hive_id))
        if call.out.json:
            shown = msgspec.to_builtins(worker)
            call.out.document(shown | {"hive_id": hive_id} if hive_id else shown)
            return
        call.out.facts(details.worker(hive_id, worker))
        if worker.log_tail:
            call.out.line("")
            call.out.block("The last lines of its log:", worker.log_tail)

    @command(workers, "logs")
    async def logs(
        call: Call,
        *,
        worker_id: WorkerIdArgument,
        hive_id: OwnerOption = None,
        lines: Annotated[
            int,
            typer.Option(
                "--lines", "-n", metavar="N", min=0, max=100_000, help="Begin this many lines back."
            ),
        ] = 200,
        follow: Annotated[
            bool, typer.Option("--follow", "-f", help="Go on until the worker has ended, or Ctrl-C.")
        ] = False,
    ) -> None:
        """Print the end of a worker's log; the log is kept when the worker has ended.

        With --json each event is a line.
        """
        from rbee_keeper.client import perform

        hive_id = await _hive_of(call, worker_id, hive_id)
        operation = checked("worker_log", worker_id=worker_id, hive_id=hive_id, lines=lines, follow=follow)
        async with call.connect() as client:
            with Teller(call.out, events=True, output=True) as tell:
                await perform(client, operation, tell, is_ours=True, on_left=call.out.left)


def _register_changing(workers: typer.Typer) -> None:
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
            typer.Option(
                "--worker",
                metavar="cuda|cpu",
                help="Kind of device (default: cuda where the hive has a GPU).",
            ),
        ] = None,
        engine_args: Annotated[
            list[str] | None,
            typer.Argument(metavar="-- ENGINE_ARGS", help="After --: options of vLLM, unchanged."),
        ] = None,
    ) -> None:
        """Load a model: start a worker and wait until it answers."""
        if engine_args and not engine_args[0].startswith("-"):
            raise typer.BadParameter(
                f"{engine_args[0]!r} is no option of the engine; these come after --, the model is --model"
            )
        operation = checked(
            "worker_spawn",
            model=model,
            worker_args=engine_args or None,
            hive_id=hive_id,
            worker=worker,
            devices=device or None,
        )

        from rbee_keeper.client import perform

        async with call.connect() as client:
            with Teller(call.out) as tell:
                spawned = await perform(client, operation, tell, is_ours=True, on_left=call.out.left)
        if call.out.json:
            call.out.document(spawned)
        else:
            call.out.line(spawned.worker_id)

    @command(workers, "stop")
    async def stop(
        call: Call,
        *,
        worker_id: WorkerIdArgument,
        hive_id: OwnerOption = None,
        grace_s: Annotated[
            float | None,
            typer.Option("--grace-s", metavar="S", min=0, help="Seconds for what runs on it (default: 30)."),
        ] = None,
    ) -> None:
        """Stop a worker; what runs on it may finish first."""
        from rbee_keeper.client import perform

        hive_id = await _hive_of(call, worker_id, hive_id)
        operation = checked("worker_stop", worker_id=worker_id, hive_id=hive_id, grace_s=grace_s)
        async with call.connect() as client:
            with Teller(call.out) as tell:
                stopped = await perform(client, operation, tell)
        if call.out.json:
            call.out.document(stopped)

    @command(workers, "drain")
    async def drain(
        call: Call,
        *,
        worker_id: WorkerIdArgument,
        hive_id: OwnerOption = None,
        undo: Annotated[bool, typer.Option("--undo", help="Let it take new requests again.")] = False,
    ) -> None:
        """Let a worker finish what it has and give it nothing new."""
        from rbee_keeper.client import perform

        hive_id = await _hive_of(call, worker_id, hive_id)
        operation = checked("worker_drain", worker_id=worker_id, hive_id=hive_id, draining=not undo)
        async with call.connect() as client:
            worker = await perform(client, operation)
        if call.out.json:
            call.out.document(worker)
        else:
            call.out.line(
                f"{worker.worker_id} is {worker.state}; {worker.running} running, {worker.waiting} waiting."
            )


def _register_processes(workers: typer.Typer) -> None:
    @command(workers, "processes")
    async def processes(call: Call, *, hive_id: AllHivesOption = None) -> None:
        """List the processes as the operating system sees them: the workers', and others' on the devices."""
        found = await listing.gather(call, WorkerProcessList(hive_id=hive_id), "processes")
        listing.show(call, "processes", found, render.processes(found))

    @command(workers, "kill")
    async def kill(
        call: Call,
        *,
        pid: Annotated[
            int, typer.Argument(metavar="PID", help="Its number, as rbee worker processes tells it.", min=2)
        ],
        hive_id: HiveIdOption = None,
        yes: YesOption = False,
    ) -> None:
        """End one process of a worker at once. A process that is not the hive's own is refused."""
        from rbee_keeper.client import perform
        from rbee_keeper.hives import only_hive

        async with call.connect() as client:
            usage = f"rbee worker kill {pid} --hive-id NAME"
            hive_id = await only_hive(client, call.settings, hive_id, usage)
            seen = await perform(client, checked("worker_process_get", pid=pid, hive_id=hive_id))
            what = f"{seen.kind} process {pid} ({seen.name})"
            confirm(f"End the {what} on {hive_id or call.settings.url}?", is_sure=yes)
            with Teller(call.out, ending=False) as tell:
                operation = checked("worker_process_delete", pid=pid, hive_id=hive_id)
                ended = await perform(client, operation, tell)
        if call.out.json:
            call.out.document(ended)
        else:
            call.out.line(f"{pid} ({ended.name}) has ended.")


async def _hive_of(call: Call, worker_id: str, hive_id: str | None) -> str | None:
    """Give the hive that has a worker; None for the hive that is asked directly.

    Raises:
        NotFound: no hive that answers has it.
        Conflict: several have.
    """
    if hive_id is not None or call.settings.is_hive:
        return hive_id
    from rbee_keeper.hives import ask_hives, the_one

    async with call.connect() as client:
        answers = await ask_hives(client, call.settings, WorkerList())
    found = answers.each("workers")
    known = ", ".join(worker.worker_id for _, worker in found) or "none"
    having = [hive for hive, worker in found if worker.worker_id == worker_id]
    silence = render.silence(answers.silent)
    return the_one(having, f"worker {worker_id!r}", f" Workers: {known}.{f' {silence}' if silence else ''}")
