"""`rbee logs`: what every service logged of one request."""

import re
from collections import Counter
from typing import Annotated, Literal, get_args

import msgspec
import typer

from rbee_contracts.errors import NotFound
from rbee_contracts.nodes import LogLine, LogSearchResult
from rbee_contracts.operations import AnyOperation
from rbee_keeper.command import Call, checked, command
from rbee_keeper.commands.job import path_part
from rbee_keeper.text import one_line

Level = Literal["debug", "info", "warning", "error"]

FOLLOW_EVERY_S = 1.0
"""Between two looks for new lines."""

_STYLES = {"debug": "dim", "warning": "yellow", "error": "red", "critical": "red"}
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
MAX_SINCE_S = 7 * 86_400.0
"""What a search takes."""

_duration = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd]?)\Z").match


def register(app: typer.Typer) -> None:
    @command(app, "logs")
    async def logs(
        call: Call,
        *,
        correlation_id: Annotated[
            str | None,
            typer.Option(
                "--correlation-id", "-c", metavar="ID", help="The request, by the id that its answer carried."
            ),
        ] = None,
        job_id: Annotated[
            str | None, typer.Option("--job-id", metavar="ID", help="The request, by its job.")
        ] = None,
        hive_id: Annotated[
            str | None, typer.Option("--hive-id", metavar="NAME", help="Ask only this hive (default: all).")
        ] = None,
        since: Annotated[
            str | None,
            typer.Option(
                "--since", metavar="TIME", help="Only the last so much time, e.g. 90s, 10m, 2h, 1d."
            ),
        ] = None,
        level: Annotated[
            Level | None,
            typer.Option("--level", metavar="|".join(get_args(Level)), help="Only lines as grave as this."),
        ] = None,
        limit: Annotated[
            int | None,
            typer.Option("--limit", metavar="N", min=1, max=10_000, help="At most so many of each machine."),
        ] = None,
        follow: Annotated[
            bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")
        ] = False,
    ) -> None:
        """Show what every service logged of one request: the queen, the hives, the workers, their engines.

        Lines are in the order of their time on each machine; machines' clocks may differ. A service keeps its
        newest lines, and a hive the logs of its workers.
        """
        if (correlation_id is None) == (job_id is None):
            raise typer.BadParameter("name the request: either --correlation-id ID or --job-id ID")

        # Imported here: `rbee --help` needs no loop.
        import asyncio

        from rbee_keeper.client import perform

        def search(found_id: str) -> AnyOperation:
            return checked(
                "log_search",
                correlation_id=found_id,
                hive_id=hive_id,
                since_s=None if since is None else _seconds(since),
                level=level,
                limit=limit,
            )

        # What cannot work is refused before anything is asked.
        operation = search("x" if correlation_id is None else correlation_id)
        path = None if job_id is None else path_part(job_id)
        async with call.connect() as client:
            if path is not None:
                operation = search((await client.get(path)).correlation_id)
            result: LogSearchResult = await perform(client, operation, is_ours=True)
            for hive, why in result.silent.items():
                call.out.say(f"Hive {hive} could not be asked: {why}", style="yellow")
            if not follow:
                _show_all(call, result)
                return
            told: Counter[bytes] = Counter()
            while True:
                _show(call, _unseen(result.lines, told))
                await asyncio.sleep(FOLLOW_EVERY_S)
                result = await perform(client, operation, is_ours=True)


def _show_all(call: Call, result: LogSearchResult) -> None:
    if call.out.json:
        call.out.document(result)
        return
    if not result.lines:
        raise NotFound(
            f"No service has a line of {result.correlation_id!r}. {' '.join(result.notes)}", code="no_lines"
        )
    _show(call, result.lines)
    for note in result.notes:
        call.out.say(note, style="dim")


def _unseen(lines: list[LogLine], told: "Counter[bytes]") -> list[LogLine]:
    """Give the lines that were not told before, and take them as told. Equal lines are counted."""
    now: Counter[bytes] = Counter()
    new = []
    for line in lines:
        key = msgspec.json.encode(line)
        now[key] += 1
        if now[key] > told[key]:
            told[key] += 1
            new.append(line)
    return new


def _show(call: Call, lines: list[LogLine]) -> None:
    width = max((len(line.service) for line in lines), default=0)
    for line in lines:
        if call.out.json:
            call.out.event(line)
        else:
            call.out.styled(_text(line, width), _STYLES.get(line.level, ""))


def _text(line: LogLine, width: int) -> str:
    """Write a line as a person reads it: when, who, what, and with what."""
    kind, _, which = line.service.partition("/")
    facts = [
        f"{name}={_fact(value)}"
        for name, value in line.facts.items()
        if value is not None and (name, value) != (f"{kind}_id", which)
    ]
    grave = "" if line.level in ("info", "debug") else f"{line.level.upper()} "
    time = line.timestamp[11:23] or " " * 12
    return one_line(f"{time}  {line.service:{width}}  {grave}{line.event}  {' '.join(facts)}".rstrip())


def _fact(value: object) -> str:
    if isinstance(value, str) and value and not re.search(r"[\s\"=]", value):
        return value
    return msgspec.json.encode(value).decode()


def _seconds(text: str) -> float:
    """Read a length of time.

    Raises:
        typer.BadParameter: it is none.
    """
    found = _duration(text.strip())
    if found is None:
        raise typer.BadParameter(f"--since {text!r} is no length of time; write 90s, 10m, 2h or 1d")
    seconds = float(found[1]) * _UNITS_S[found[2]]
    if not 0 < seconds <= MAX_SINCE_S:
        raise typer.BadParameter(f"--since {text!r} must be more than 0 and at most 7d")
    return seconds
