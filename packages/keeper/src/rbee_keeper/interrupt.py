"""Ctrl-C and SIGTERM as cancellation: what runs is cancelled, cleans up, and the signal is told."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


class Interrupted(Exception):
    """The work was ended by a signal; `exit_code` is what a shell gives for it."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(signum.name)
        self.exit_code = 128 + signum


async def interruptible(work: Coroutine[Any, Any, int | None]) -> int | None:
    """Run `work`, cancelling it on SIGINT or SIGTERM; a second signal cancels its cleaning up too.

    Raises:
        Interrupted: a signal ended it.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    received: list[signal.Signals] = []

    def on_signal(signum: signal.Signals) -> None:
        received.append(signum)
        task.cancel()

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, on_signal, signum)
    try:
        return await task
    except asyncio.CancelledError:
        if received:
            raise Interrupted(received[0]) from None
        raise
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signum)
