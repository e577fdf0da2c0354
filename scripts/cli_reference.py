"""Write docs/reference/cli.md from the commands themselves, so that the page cannot tell anything else.

`python scripts/cli_reference.py` writes it; with `--check` it only tells whether it is up to date.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from rbee_keeper.app import build_app

PAGE = Path(__file__).resolve().parents[1] / "docs/reference/cli.md"

_HEAD = """# The command line

<!-- Written by scripts/cli_reference.py from the commands; do not edit. -->

`rbee` speaks to a queen, or with `--hive` to one hive directly. This page lists every command with its
arguments and options, as `rbee COMMAND --help` does.

## What all commands have in common

These options stand before or after the name of a command:

{common}

**Output.** What was asked for goes to stdout, and what is said about it to stderr. At a terminal tables are
as wide as the terminal and leave out columns for which there is no room; in a pipe they are plain columns
with everything in them. Control characters in names, logs and generated text never reach a terminal.
`NO_COLOR` turns colours off.

**JSON.** `--json` prints one document: the result of the [operation](job-operations.md) that the command
runs, and for lists over several hives the same items with a `hive_id` each. `infer`, `job stream`, `model
download` and `worker logs` print one event a line instead. Where a command fails before it has printed the
event that says so, the document is the error: `error`, `details`, `code` and `correlation_id`.

**Lost connections.** When the connection to the service is lost while a command reads a job, the command
says so at once, tries for up to 60 seconds to get it back, and goes on exactly where it was.

**Ctrl-C** cancels the job that the command waits for, where it is the command's own, and says so if that
could not be done.

| exit status | meaning |
| --- | --- |
| 0 | done |
| 1 | failed: the last line on stderr says why and what to do. For `check`: something failed |
| 2 | the command line cannot be meant like this; nothing was sent |
| 130, 143 | ended by Ctrl-C, by SIGTERM |
| 141 | nobody reads the output any more |

| variable | meaning |
| --- | --- |
| `RBEE_QUEEN_URL` | the queen to speak to, where `--queen` and `--hive` are not given |
| `RBEE_TOKEN` | the cluster's token, where `--token-file` is not given |
| `RBEE_MODELS_DIR` | the models folder of `rbee up`, where `--models-dir` is not given |
| `NO_COLOR` | set to anything: no colours |
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    page = "\n".join(_page()) + "\n"
    if parser.parse_args(argv).check:
        return 0 if PAGE.exists() and PAGE.read_text() == page else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page)
    return 0


def _page() -> Iterator[str]:
    root: Any = typer.main.get_command(build_app())
    common = {param.name for param in root.params}
    yield _HEAD.format(common="\n".join(_table(root.params)))
    for name, found in root.commands.items():
        yield f"## rbee {name}\n"
        yield f"{found.help}\n"
        if hasattr(found, "commands"):
            for sub, command in found.commands.items():
                yield f"### rbee {name} {sub}\n"
                yield f"{command.help}\n"
                yield from _command(f"rbee {name} {sub}", command, common)
        else:
            yield from _command(f"rbee {name}", found, common)


def _command(path: str, command: Any, common: set[str | None]) -> Iterator[str]:
    """Describe one command: how it is called, and what its own arguments and options mean."""
    own = [param for param in command.params if param.name not in common and not param.hidden]
    arguments = [_argument(param) for param in own if param.param_type_name == "argument"]
    options = ["[OPTIONS]"] if any(param.param_type_name == "option" for param in own) else []
    yield f"```text\n{' '.join([path, *options, *arguments])}\n```\n"
    if own:
        yield from _table(own)
        yield ""


def _argument(param: Any) -> str:
    name = str(param.metavar)
    return name if param.required else f"[{name}]"


def _table(params: list[Any]) -> Iterator[str]:
    yield "| argument or option | meaning |"
    yield "| --- | --- |"
    for param in params:
        names = [str(param.metavar)] if param.param_type_name == "argument" else [*param.opts]
        if param.param_type_name == "option" and not param.is_flag:
            names[0] += f" {param.metavar}"
        notes = " Needed." if param.required and param.param_type_name == "option" else ""
        if param.default not in (None, False) and param.show_default:
            notes += f" Default: `{param.default}`."
        yield f"| {', '.join(f'`{_cell(name)}`' for name in names)} | {_cell(param.help or '')}{notes} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
