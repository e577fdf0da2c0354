"""How a function becomes a command: the options all have, one run, and its end as an exit status."""

import asyncio
import inspect
import os
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from msgspec import Struct

from rbee_contracts.errors import RbeeError
from rbee_keeper.interrupt import Interrupted, interruptible
from rbee_keeper.output import Output
from rbee_keeper.settings import Options, Settings, resolve

if TYPE_CHECKING:
    from rbee_job_client import JobClient

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BROKEN_PIPE = 141

QueenOption = Annotated[
    str | None,
    typer.Option(
        "--queen",
        metavar="URL",
        help="The queen to speak to (default: RBEE_QUEEN_URL, else http://127.0.0.1:7833).",
        rich_help_panel="Whom to ask, how to answer",
    ),
]
HiveOption = Annotated[
    str | None,
    typer.Option(
        "--hive",
        metavar="URL",
        help="Speak to one hive directly, e.g. http://127.0.0.1:7835.",
        rich_help_panel="Whom to ask, how to answer",
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="Holds the cluster's token (default: the one in RBEE_TOKEN, if any).",
        rich_help_panel="Whom to ask, how to answer",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print JSON.", rich_help_panel="Whom to ask, how to answer"),
]
HiveIdOption = Annotated[
    str | None, typer.Option("--hive-id", metavar="NAME", help="Which hive; needed where there are several.")
]


class Call(Struct, frozen=True):
    """One call of `rbee`: whom it speaks to, where it prints, what its environment was."""

    settings: Settings
    token_file: Path | None
    out: Output
    environ: Mapping[str, str]

    def connect(self) -> "AbstractAsyncContextManager[JobClient]":
        # Imported here: an HTTP client takes longer to load than `rbee --help` may last.
        from rbee_keeper.client import connect

        return connect(self.settings)


Command: TypeAlias = Callable[..., Coroutine[Any, Any, int | None]]


def command(
    app: typer.Typer, name: str, *, has_own_signals: bool = False, **settings: Any
) -> Callable[[Command], Command]:
    """Register `async def function(call, …) -> exit status or None` as a command.

    Args:
        has_own_signals: the function handles SIGINT and SIGTERM itself; else they cancel it.
        settings: for typer.
    """

    def register(function: Command) -> Command:
        def run(
            context: typer.Context,
            queen: str | None,
            hive: str | None,
            token_file: Path | None,
            json: bool,
            **values: Any,
        ) -> None:
            options = Options(queen=queen, hive=hive, token_file=token_file, json=json)
            call = _call(options.over(context.obj))
            raise typer.Exit(_run(call, function(call, **values), has_own_signals))

        run.__doc__ = function.__doc__
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "call"]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                _parameter("context", typer.Context),
                *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
                _parameter("queen", QueenOption, None),
                _parameter("hive", HiveOption, None),
                _parameter("token_file", TokenFileOption, None),
                _parameter("json", JsonOption, False),
            ]
        )
        app.command(name, **settings)(run)
        return function

    return register


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _call(options: Options) -> Call:
    """Read what a call depends on, once."""
    environ = dict(os.environ)
    try:
        settings = resolve(options, environ)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc
    return Call(settings, options.token_file, Output(json=options.json), environ)


def _run(call: Call, work: Coroutine[Any, Any, int | None], has_own_signals: bool) -> int:
    try:
        return asyncio.run(work if has_own_signals else interruptible(work)) or EXIT_OK
    except RbeeError as exc:
        call.out.failure(exc, call.settings.url)
        return EXIT_FAILED
    except Interrupted as exc:
        call.out.end_text()
        return exc.exit_code
    except BrokenPipeError:
        call.out.abandon()
        return EXIT_BROKEN_PIPE


def stdin_text() -> str:
    """Read text from stdin, without the newline that ends it."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as exc:
        raise typer.BadParameter("stdin is not text in UTF-8") from exc
