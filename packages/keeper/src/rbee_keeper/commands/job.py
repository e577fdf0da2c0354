"""`rbee job`: look at jobs, read their streams again, cancel them."""

from typing import Annotated, Literal, get_args

import typer

from rbee_contracts.errors import Conflict
from rbee_contracts.jobs import JobState
from rbee_contracts.sse import START, parse_event_id
from rbee_keeper import details, render
from rbee_keeper.command import Call, command
from rbee_keeper.telling import Teller

JobIdArgument = Annotated[str, typer.Argument(metavar="JOB_ID", show_default=False)]
State = Literal["pending", "running", "completed", "failed", "cancelled"]
assert get_args(State) == get_args(JobState)


def register(app: typer.Typer) -> None:
    jobs = typer.Typer(help="List, show, follow and cancel jobs.", no_args_is_help=True)
    app.add_typer(jobs, name="job")

    @command(jobs, "list")
    async def list_(
        call: Call,
        *,
        state: Annotated[
            State | None,
            typer.Option("--state", metavar="|".join(get_args(State)), help="Only jobs in this state."),
        ] = None,
        operation: Annotated[
            str | None, typer.Option("--operation", metavar="NAME", help="Only this operation, e.g. infer.")
        ] = None,
        limit: Annotated[
            int, typer.Option("--limit", metavar="N", min=1, max=1000, help="At most this many.")
        ] = 50,
        cursor: Annotated[
            str | None, typer.Option("--cursor", metavar="CURSOR", help="Go on where the last list ended.")
        ] = None,
    ) -> None:
        """List jobs, newest first."""
        async with call.connect() as client:
            page = await client.list_jobs(state=state, operation=operation, limit=limit, cursor=cursor)
        if call.out.json:
            call.out.document(page)
            return
        call.out.grid(render.jobs(page.jobs))
        if page.next_cursor is not None:
            call.out.say(f"There are more: add --cursor {page.next_cursor}", style="dim")

    @command(jobs, "show")
    async def show(call: Call, *, job_id: JobIdArgument) -> None:
        """Show what is known of one job."""
        async with call.connect() as client:
            record = await client.get(path_part(job_id))
        if call.out.json:
            call.out.document(record)
        else:
            call.out.facts(details.job(record))

    @command(jobs, "cancel")
    async def cancel(call: Call, *, job_id: JobIdArgument) -> None:
        """Cancel a job, down to the engine."""
        async with call.connect() as client:
            if not await client.cancel(path_part(job_id)):
                # Tells an unknown job from an ended one.
                record = await client.get(job_id)
                raise Conflict(f"{job_id} has already {record.state}.", code="job_finished")
        if call.out.json:
            call.out.document({"job_id": job_id, "status": "cancelled"})
        else:
            call.out.line(f"{job_id} is cancelled.")

    @command(jobs, "stream")
    async def stream(
        call: Call,
        *,
        job_id: JobIdArgument,
        position: Annotated[
            str | None,
            typer.Option("--from", metavar="N-I", help="Only what follows this event id, e.g. 4-2."),
        ] = None,
    ) -> None:
        """Follow a job from its beginning to its end: output to stdout, the rest to stderr.

        The exit status is the job's: 0 completed, 1 not. Leaving with Ctrl-C does not cancel it, unless
        it is an inference that nobody else reads.
        """
        try:
            start = START if position is None else parse_event_id(position)
        except ValueError as exc:
            raise typer.BadParameter(f"--from: {exc}") from exc

        from rbee_keeper.client import follow

        async with call.connect() as client:
            with Teller(call.out, events=True, output=True, whole=True) as tell:
                await follow(client, path_part(job_id), start, tell)
        call.out.end_text()


def path_part(job_id: str) -> str:
    """Give a job id that may stand in a URL; nothing else can be one."""
    if not job_id.startswith("job-") or not job_id.replace("-", "").isalnum() or not job_id.isascii():
        raise typer.BadParameter(f"{job_id!r} is no job id; they look like job-<uuid>, see: rbee job list")
    return job_id
