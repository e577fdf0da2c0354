"""`rbee model`: fetch models, look at them, delete them, bring them into device memory and out of it."""

from typing import Annotated, Literal

import msgspec
import typer

from rbee_contracts.errors import NotFound
from rbee_contracts.nodes import ModelInfo
from rbee_contracts.operations import ModelList, WorkerList
from rbee_keeper import details, render
from rbee_keeper.command import (
    AllHivesOption,
    Call,
    HiveIdOption,
    ModelArgument,
    OwnerOption,
    YesOption,
    checked,
    command,
    confirm,
)
from rbee_keeper.commands import listing
from rbee_keeper.telling import Teller
from rbee_keeper.units import size


def register(app: typer.Typer) -> None:
    models = typer.Typer(
        help="Fetch, list, show and delete models; load and unload them.", no_args_is_help=True
    )
    app.add_typer(models, name="model")

    @command(models, "list")
    async def list_(call: Call, *, hive_id: AllHivesOption = None) -> None:
        """List the models that lie on the hives."""
        found = await listing.gather(call, ModelList(hive_id=hive_id), "models")
        listing.show(call, "models", found, render.models(found))

    @command(models, "show")
    async def show(call: Call, *, model: ModelArgument, hive_id: AllHivesOption = None) -> None:
        """Show one model and its files, as they lie on each hive that has it."""
        from rbee_keeper.client import perform

        hives = await _owners(call, model, hive_id)
        async with call.connect() as client:
            found: list[tuple[str, ModelInfo]] = [
                (hive or "-", await perform(client, checked("model_get", model=model, hive_id=hive)))
                for hive in hives
            ]
        if call.out.json:
            shown = [msgspec.to_builtins(each) | {"hive_id": hive} for hive, each in found]
            call.out.document({"models": shown})
            return
        for index, (hive, each) in enumerate(found):
            if index:
                call.out.line("")
            call.out.facts(details.model(hive, each))
            if each.file_list:
                call.out.line("")
                call.out.grid(render.files(each.file_list))

    @command(models, "download")
    async def download(
        call: Call,
        *,
        model: ModelArgument,
        revision: Annotated[
            str | None,
            typer.Option("--revision", metavar="NAME", help="A branch, a tag or a commit (default: main)."),
        ] = None,
        allow_pattern: Annotated[
            list[str] | None,
            typer.Option(
                "--allow-pattern", metavar="GLOB", help='Only files like this, e.g. "*.json"; repeatable.'
            ),
        ] = None,
        source: Annotated[
            Literal["auto", "hub", "hive"],
            typer.Option(
                "--source",
                metavar="auto|hub|hive",
                help="From the model hub, from another hive, or from whichever has it nearer.",
            ),
        ] = "auto",
        hive_id: HiveIdOption = None,
        detach: Annotated[
            bool, typer.Option("--detach", "-d", help="Print the job's id and leave; the download goes on.")
        ] = False,
    ) -> None:
        """Fetch a model into a hive's models folder, and show how it goes on.

        What lies there already is not fetched again, so a download that was broken off goes on where it
        was. Ctrl-C cancels it and keeps what was fetched. With --json each event is a line.
        """
        operation = checked(
            "model_download",
            model=model,
            revision=revision,
            allow_patterns=allow_pattern or None,
            source=source,
            hive_id=hive_id,
        )
        if detach:
            async with call.connect() as client:
                accepted = await client.submit(operation, respond_async=True)
            if call.out.json:
                call.out.document(accepted)
            else:
                call.out.line(accepted.job_id)
                call.out.say(f"Follow it: rbee job stream {accepted.job_id}", style="dim")
            return

        from rbee_keeper.client import perform

        def left(job_id: str, was_cancelled: bool) -> None:
            tell.close()
            call.out.left(job_id, was_cancelled)
            if was_cancelled:
                had = "What was fetched is"
                if tell.last_progress is not None:
                    had = f"{size(tell.last_progress.bytes_done)} were fetched and are"
                call.out.say(f"Cancelled. {had} kept; the same command goes on from there.", style="yellow")

        async with call.connect() as client:
            with Teller(call.out, events=True) as tell:
                fetched = await perform(client, operation, tell, is_ours=True, on_left=left)
        if not call.out.json:
            call.out.line(fetched.model)

    @command(models, "delete")
    async def delete(
        call: Call, *, model: ModelArgument, hive_id: OwnerOption = None, yes: YesOption = False
    ) -> None:
        """Delete a model's files from a hive. A model that a worker uses is not deleted."""
        from rbee_keeper.client import perform
        from rbee_keeper.hives import the_one

        operation = checked("model_delete", model=model, hive_id=hive_id)
        owners = await _owners(call, model, hive_id)
        if owners[0] is not None:
            hive_id = the_one(filter(None, owners), f"model {model!r}")
            operation = checked("model_delete", model=model, hive_id=hive_id)
        confirm(f"Delete {model} from {hive_id or call.settings.url}?", is_sure=yes)
        async with call.connect() as client:
            with Teller(call.out, ending=False) as tell:
                deleted = await perform(client, operation, tell)
        if call.out.json:
            call.out.document(deleted)
        else:
            call.out.line(f"{deleted.model} is deleted; {size(deleted.freed)} are free again.")

    @command(models, "load")
    async def load(call: Call, *, model: ModelArgument, hive_id: HiveIdOption = None) -> None:
        """Bring a model into device memory: wake a worker that sleeps, else start one."""
        from rbee_keeper.client import perform

        operation = checked("model_load", model=model, hive_id=hive_id)
        async with call.connect() as client:
            with Teller(call.out) as tell:
                worker = await perform(client, operation, tell, is_ours=True, on_left=call.out.left)
        if call.out.json:
            call.out.document(worker)
        else:
            call.out.line(worker.worker_id)

    @command(models, "unload")
    async def unload(call: Call, *, model: ModelArgument, hive_id: OwnerOption = None) -> None:
        """Take a model out of device memory: its workers sleep where the device can, else they stop."""
        from rbee_keeper.client import perform
        from rbee_keeper.hives import the_one

        operation = checked("model_unload", model=model, hive_id=hive_id)
        if not call.settings.is_hive and hive_id is None:
            workers = await listing.gather(call, WorkerList(), "workers")
            having = [hive for hive, worker in workers if worker.model == model]
            known = ", ".join(sorted({worker.model for _, worker in workers})) or "none"
            hive_id = the_one(having, f"worker has {model!r} loaded", f" Loaded: {known}.")
            operation = checked("model_unload", model=model, hive_id=hive_id)
        async with call.connect() as client:
            with Teller(call.out, ending=False) as tell:
                unloaded = await perform(client, operation, tell)
        if call.out.json:
            call.out.document(unloaded)
            return
        states = ", ".join(f"{worker.worker_id} is {worker.state}" for worker in unloaded.workers)
        call.out.line(f"{unloaded.model} is out of device memory{': ' if states else ''}{states}.")


async def _owners(call: Call, model: str, hive_id: str | None) -> list[str | None]:
    """Give the hives that have a model: the one that is named or asked directly, or all that list it.

    The only hive is asked in any case: it knows of what is not listed, a download that was broken off.

    Raises:
        NotFound: none of several hives lists it.
    """
    if hive_id is not None or call.settings.is_hive:
        return [hive_id]
    from rbee_keeper.hives import ask_hives

    async with call.connect() as client:
        answers = await ask_hives(client, call.settings, ModelList())
    listing.tell_silence(call, answers)
    found = answers.each("models")
    having: list[str | None] = [hive for hive, each in found if each.model == model]
    if having or len(answers.results) + len(answers.silent) == 1:
        return having or [*answers.results]
    known = ", ".join(sorted({each.model for _, each in found})) or "none"
    raise NotFound(
        f"No model {model!r} on any hive. Models: {known}. Fetch it: rbee model download {model}",
        code="model_not_found",
    )
