"""The requests that this worker has taken and not ended, whether or not its engine has seen them yet."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from rbee_contracts.nodes import EngineLoad
from rbee_job_server import JobContext


class Activity:
    """Counts requests. An engine that is stuck before its first step tells nothing of them by itself.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._count = 0
        self._since = 0.0

    @property
    def count(self) -> int:
        return self._count

    def counting(
        self, handler: Callable[[Any, JobContext], Awaitable[Any]]
    ) -> Callable[[Any, JobContext], Awaitable[Any]]:
        """Give a handler that counts its requests for as long as they run."""

        async def counted(op: Any, context: JobContext) -> Any:
            if not self._count:
                self._since = self._now()
            self._count += 1
            try:
                return await handler(op, context)
            finally:
                self._count -= 1

        return counted

    def complete(self, load: EngineLoad) -> EngineLoad:
        """Add to what the engine tells: requests it has not taken up yet wait.

        `step_age_s` begins anew with the first request after a pause: an idle engine makes no steps.
        """
        unseen = max(0, self._count - load.running - load.waiting)
        age_s = load.step_age_s
        if self._count:
            busy_s = round(self._now() - self._since, 3)
            age_s = busy_s if age_s is None else min(age_s, busy_s)
        return msgspec.structs.replace(load, waiting=load.waiting + unseen, step_age_s=age_s)
