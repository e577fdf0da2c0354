"""Holding back what readers must not see before it is durable."""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from rbee_contracts.events import AnyEvent
from rbee_contracts.sse import START, Position
from rbee_job_server.journal import Journal

if TYPE_CHECKING:
    from rbee_job_server.jobs import Job


class Staging:
    """Numbers a job's events, records those that must last, and releases all in order.

    Narration, the first output and the end are released once they are durable; other output at once,
    unless something before it is still held. A reader therefore never has anything that a restart
    would not know, and a token costs nothing. Narration alone is in no hurry.

    Args:
        release: makes an event visible.
        position: where a restored job's narration ended; its output is said again from the start.
    """

    __slots__ = ("_held", "_job", "_journal", "_release", "closed", "narrations", "outputs")

    def __init__(
        self,
        job: "Job",
        journal: Journal,
        release: Callable[[AnyEvent, bytes], None],
        position: Position = START,
    ) -> None:
        self._job = job
        self._journal = journal
        self._release = release
        self._held: deque[tuple[AnyEvent, bytes, bool]] | None = None
        self.narrations = position.narrations
        self.outputs = 0
        self.closed = False

    def add(self, event: AnyEvent, body: bytes, lower_n: int | None) -> None:
        """Take the job's next event, whose JSON is `body`.

        `lower_n` is its place in the stream below, if it is narration from there.
        """
        if event.kind == "output":
            self.outputs += 1
            is_gate = not self._job.has_spoken
            if is_gate:
                self._job.speak()
                self._journal.speaks(self._job)
            elif not self._held:
                self._release(event, body)
                return
        else:
            is_gate = True
            self.narrations += 1
            position = Position(self.narrations, self.outputs)
            if event.kind == "terminal":
                self.closed = True
                self._journal.ended(self._job, position, body)
            else:
                self._journal.narrated(self._job, position, body, lower_n)
        if self._held is None:
            self._held = deque()
        self._held.append((event, body, is_gate))
        if is_gate:
            self._journal.then(self._gate_opens, urgent=event.kind != "narration")

    def pass_output(self) -> bool:
        """Count an output that is released at once; False where it must come through `add`."""
        if self._held or self.closed or not self._job.has_spoken:
            return False
        self.outputs += 1
        return True

    def _gate_opens(self) -> None:
        """The oldest held event is durable: release it, and what waited only for it."""
        held = self._held
        if held is None:
            return
        event, body, _ = held.popleft()
        self._release(event, body)
        while held and not held[0][2]:
            self._release(*held.popleft()[:2])
        if not held:
            self._held = None
            if self.closed:
                self._job.settle()
