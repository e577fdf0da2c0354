"""`rbee infer`: tokens to stdout as they come."""

from typing import Annotated, Any

import typer

from rbee_contracts.events import AnyEvent, Token
from rbee_keeper.command import Call, checked, command, stdin_text
from rbee_keeper.output import Output


def register(app: typer.Typer) -> None:
    @command(app, "infer")
    async def infer(
        call: Call,
        *,
        prompt: Annotated[
            str,
            typer.Argument(
                metavar="PROMPT",
                help="What to continue or to answer; - reads it from stdin.",
                show_default=False,
            ),
        ],
        model: Annotated[
            str,
            typer.Option(
                "--model", "-m", metavar="MODEL", help="The model that answers.", show_default=False
            ),
        ],
        chat: Annotated[
            bool, typer.Option("--chat", help="Send the prompt as a user's message in a chat.")
        ] = False,
        system: Annotated[
            str | None, typer.Option("--system", metavar="TEXT", help="System message; means --chat too.")
        ] = None,
        max_tokens: Annotated[
            int | None, typer.Option("--max-tokens", metavar="N", min=1, help="End after this many tokens.")
        ] = None,
        temperature: Annotated[
            float | None,
            typer.Option("--temperature", metavar="T", min=0, help="0 takes the likeliest token each time."),
        ] = None,
        top_p: Annotated[
            float | None,
            typer.Option(
                "--top-p", metavar="P", help="Choose from the tokens that make up this probability."
            ),
        ] = None,
        seed: Annotated[
            int | None, typer.Option("--seed", metavar="N", help="The same seed, the same answer.")
        ] = None,
        stop: Annotated[
            list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; repeatable.")
        ] = None,
        hive_id: Annotated[
            str | None, typer.Option("--hive-id", metavar="NAME", help="Run on this hive only.")
        ] = None,
        worker_id: Annotated[
            str | None, typer.Option("--worker-id", metavar="ID", help="Run on this worker only.")
        ] = None,
        timeout_s: Annotated[
            float | None, typer.Option("--timeout-s", metavar="S", help="Give up after this many seconds.")
        ] = None,
        verbose: Annotated[
            bool, typer.Option("--verbose", "-v", help="Tell on stderr what happens on the way.")
        ] = False,
    ) -> None:
        """Generate text. Exit status: 0 done, 1 failed, 130 cancelled with Ctrl-C."""
        text = stdin_text() if prompt == "-" else prompt
        asked: dict[str, Any] = {"prompt": text}
        if chat or system is not None:
            instructions = [] if system is None else [{"role": "system", "content": system}]
            asked = {"messages": [*instructions, {"role": "user", "content": text}]}
        operation = checked(
            "infer",
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop or None,
            hive_id=hive_id,
            worker_id=worker_id,
            timeout_s=timeout_s,
            **asked,
        )

        from rbee_keeper.client import perform

        async with call.connect() as client:
            await perform(client, operation, _Printer(call.out, verbose), is_ours=True, on_left=call.out.left)
        call.out.end_text()


class _Printer:
    """Shows the events of an inference."""

    def __init__(self, out: Output, verbose: bool) -> None:
        self._out = out
        self._verbose = verbose

    def __call__(self, event: AnyEvent) -> None:
        if self._out.json:
            self._out.event(event)
        elif isinstance(event, Token):
            self._out.text(event.message)
        elif event.action == "warning" or (self._verbose and event.action not in ("error", "execute_error")):
            self._out.narrate(event)
