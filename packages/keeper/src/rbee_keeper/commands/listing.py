"""Lists over all hives: ask each, put what they have into one table or document."""

from typing import TYPE_CHECKING, Any

import msgspec

from rbee_contracts.operations import HiveOperation
from rbee_keeper import render
from rbee_keeper.command import Call
from rbee_keeper.grid import Grid

if TYPE_CHECKING:
    from rbee_keeper.hives import Answers


async def gather(call: Call, operation: HiveOperation, field: str) -> list[tuple[str, Any]]:
    """Give what each hive has, each with its hive; say which hives are not in it."""
    from rbee_keeper.hives import ask_hives

    async with call.connect() as client:
        answers = await ask_hives(client, call.settings, operation)
    tell_silence(call, answers)
    return answers.each(field)


def tell_silence(call: Call, answers: "Answers") -> None:
    """Say which hives a list leaves out."""
    silence = render.silence(answers.silent)
    if silence is not None:
        call.out.say(silence, style="yellow")


def show(call: Call, field: str, found: list[tuple[str, Any]], grid: Grid) -> None:
    """Show the table, or with --json the document."""
    if call.out.json:
        call.out.document({field: [msgspec.to_builtins(item) | {"hive_id": hive} for hive, item in found]})
    else:
        call.out.grid(grid)
