"""What `rbee up` says: short lines for a person, one JSON event a line for a program."""

import contextlib
from typing import Any

from rbee_contracts.events import AnyEvent
from rbee_keeper.output import Output


class Voice:
    """Speaks through an `Output`. A terminal that has gone away stops nothing."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def tell(self, action: str, text: str, *, who: str = "", style: str = "", **data: Any) -> None:
        """Tell one thing."""
        with contextlib.suppress(OSError, ValueError):
            if self._out.json:
                about = {"who": who} if who else {}
                self._out.event({"action": action, "message": text, **about, **data})
            else:
                self._out.styled(f"{who:8}{text}" if who else text, style)

    def narrate(self, event: AnyEvent) -> None:
        """Tell what a job narrates."""
        with contextlib.suppress(OSError, ValueError):
            if self._out.json:
                self._out.event(event)
            elif event.kind == "narration" and event.action not in ("execute", "error"):
                self._out.styled(f"{'worker':8}{event.message}", "")
