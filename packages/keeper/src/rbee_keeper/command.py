"""How a function becomes a command: the options all have, one run, and its end as an exit status."""

import inspect
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import msgspec
import typer
from msgspec import Struct

from rbee_contracts.errors import InvalidRequest, RbeeError
from rbee_contracts.operations import AnyOperation, decode_operation
from rbee_keeper.output import Output
from rbee_keeper.settings import Options, Settings, resolve
from rbee_keeper.text import one_line

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
        help="Holds the cluster's token (default: RBEE_TOKEN_FILE, else RBEE_TOKEN, if any).",
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
AllHivesOption = Annotated[
    str | None, typer.Option("--hive-id", metavar="NAME", help="Only this hive (default: all that answer).")
]
OwnerOption = Annotated[
    str | None, typer.Option("--hive-id", metavar="NAME", help="On this hive (default: the one that has it).")
]
HiveIdArgument = Annotated[
    str | None,
    typer.Argument(metavar="HIVE_ID", help="Which hive; needed where there are several.", show_default=False),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder in the models folder, ORG/NAME, or ORG/NAME@REVISION.",
        show_default=False,
    ),
]
WorkerIdArgument = Annotated[
    str, typer.Argument(metavar="WORKER_ID", help="Its id, as rbee worker list tells it.", show_default=False)
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class Call(Struct, frozen=True):
    """One call of `rbee`: whom it speaks to, where it prints, what its environment was."""

    settings: Settings
    token_file: Path | None
    out: Output
    environ: Mapping[str, str]

    def connect(self) -> "AbstractAsyncContextManager[JobClient]":
        # Imported here: an HTTP client takes longer to load than `rbee --help` may last.
        from rbee_keeper.connection import PatientClient

        settings = self.settings
        return PatientClient(
            settings.url, token=settings.token, on_connection=partial(self.out.connection, settings.url)
        )


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

        run.__doc__ = _reflowed(function.__doc__ or "")
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


def _reflowed(doc: str) -> str:
    """Give each paragraph on one line: help is as wide as the terminal, not as the source."""
    paragraphs = inspect.cleandoc(doc).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


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
    # Imported here, as is what connects: `rbee --help` needs no loop.
    import asyncio

    from rbee_keeper.interrupt import Interrupted, interruptible

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


def checked(operation: str, **fields: Any) -> AnyOperation:
    """Make an operation, by the contracts' own bounds: what cannot work is not sent. None: not given.

    Raises:
        typer.BadParameter: a field is not what it must be.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return decode_operation(msgspec.json.encode({"operation": operation} | given))
    except InvalidRequest as exc:
        raise typer.BadParameter(exc.details.removeprefix(f"{operation}: ")) from exc
    except UnicodeEncodeError as exc:
        raise typer.BadParameter("this is not text in UTF-8") from exc


def confirm(question: str, *, is_sure: bool) -> None:
    """Ask a person before something that cannot be taken back; where there is none, it must be said.

    Raises:
        typer.Exit: the answer is not yes.
        typer.BadParameter: nobody can be asked, and `--yes` was not given.
        KeyboardInterrupt: the answer is Ctrl-C.
    """
    if is_sure:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise typer.BadParameter("this cannot be taken back; where nobody can be asked, say --yes")
    # While a person is asked no loop runs that could take the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.stderr.write(f"{one_line(question)} [y/N] ")
        sys.stderr.flush()
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        sys.stderr.write("\nNothing was done.\n")
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    if answer.strip().lower() not in ("y", "yes"):
        sys.stderr.write("Nothing was done.\n")
        raise typer.Exit(EXIT_FAILED)


def stdin_text() -> str:
    """Read text from stdin, without the newline that ends it."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as exc:
        raise typer.BadParameter("stdin is not text in UTF-8") from exc
