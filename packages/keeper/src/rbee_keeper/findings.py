"""The findings of a check, told one by one as they come."""

import msgspec

from rbee_contracts.events import AnyEvent
from rbee_contracts.nodes import CheckResult, Finding
from rbee_keeper import details
from rbee_keeper.output import STYLES, Output
from rbee_keeper.text import one_line


class Findings:
    """Shows each finding once, whether it came as an event or only with the result."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._shown: list[Finding] = []

    def __call__(self, event: AnyEvent) -> None:
        data = getattr(event, "data", None)
        if event.kind == "narration" and isinstance(data, dict) and not self._out.json:
            try:
                found = msgspec.convert(data, Finding)
            except msgspec.ValidationError:
                return
            self._show(found)

    def end(self, result: CheckResult) -> None:
        """Show what has not come before, and sum up; with --json, the result is the document."""
        if self._out.json:
            self._out.document(result)
            return
        for found in result.findings:
            if found not in self._shown:
                self._show(found)
        self._out.line("")
        self._out.styled(details.verdict(result.findings), STYLES["ok" if result.ok else "failed"])

    def _show(self, found: Finding) -> None:
        self._shown.append(found)
        first, *rest = details.finding(found)
        self._out.styled(one_line(first), STYLES[found.status])
        for more in rest:
            self._out.line(one_line(more))
