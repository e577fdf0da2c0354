"""What a service tells the service manager that started it: that it is ready, how it is, that it lives.

This is systemd's sd_notify protocol: datagrams of `NAME=value` lines to the socket in `NOTIFY_SOCKET`.
Without that variable nothing is told to anyone, and a socket that is gone stops no service.
"""

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NoReturn

import anyio
import structlog

log = structlog.get_logger(__name__)

NOTIFY_VARIABLES = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"})
"""What the service manager sets for one process; what that process starts must not have them."""

STATUS_EVERY_S = 5.0
"""The longest time between two looks at what the status says."""

STOP_STEP_S = 20.0
"""While a service stops, it asks for so much more time every `STATUS_EVERY_S`: a wedged one asks no more."""

STOP_MARGIN_S = 60.0
"""For all that follows the draining of a stop; a service that takes longer asks for no more time."""

UNSENT_LIMIT = 16
"""Messages that wait for a service manager which does not read; beyond it the oldest are dropped."""


class Notifier:
    """Sends messages to the service manager.

    Args:
        address: of its socket: a path, or `@name` of the abstract namespace; None where there is none.
        watchdog_s: how long a service may go without a sign of life; None where nobody watches.
    """

    def __init__(self, address: str | None = None, watchdog_s: float | None = None) -> None:
        self.watchdog_s = watchdog_s
        self._address = address
        self._unsent: list[bytes] = []
        self._status = ""

    @classmethod
    def of(cls, environ: Mapping[str, str], pid: int) -> "Notifier":
        """Make the one that the environment of the process `pid` asks for."""
        address = environ.get("NOTIFY_SOCKET") or None
        if address is not None and address[0] not in "/@":
            log.warning("notify_socket_not_usable", reason="neither a path nor an abstract name")
            address = None
        for_us = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
        period = environ.get("WATCHDOG_USEC", "")
        watches = for_us and period.isascii() and period.isdecimal() and int(period) > 0
        return cls(address, int(period) / 1e6 if watches and address is not None else None)

    @property
    def is_heard(self) -> bool:
        """Whether there is anybody to tell."""
        return self._address is not None

    def starting(self, status: str, limit_s: float) -> None:
        """Tell of a step of the start, which may take `limit_s` seconds beyond the unit's own limit."""
        self._status = status
        self._send(f"STATUS={_line(status)}", _extend(limit_s))

    def ready(self, status: str) -> None:
        """Tell that the service answers."""
        self._status = status
        self._send("READY=1", f"STATUS={_line(status)}")

    def status(self, status: str) -> None:
        """Tell how the service is, where that has changed."""
        if status != self._status:
            self._status = status
            self._send(f"STATUS={_line(status)}")

    def alive(self) -> None:
        """Give a sign of life."""
        self._send("WATCHDOG=1")

    def stopping(self, status: str, limit_s: float) -> None:
        """Tell that the service has begun to stop."""
        self._status = status
        self._send("STOPPING=1", f"STATUS={_line(status)}", _extend(limit_s))

    def extend(self, limit_s: float) -> None:
        """Ask for `limit_s` more seconds to start or to stop."""
        self._send(_extend(limit_s))

    def _send(self, *lines: str) -> None:
        """Send a message, after those that the service manager was too busy to take."""
        if self._address is None:
            return
        self._unsent = [*self._unsent, "\n".join(lines).encode(errors="replace")][-UNSENT_LIMIT:]
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, kind) as sock,
        ):  # what fails goes with the next one
            while self._unsent:
                sock.sendto(self._unsent[0], _name(self._address))
                del self._unsent[0]


class Reporter:
    """Reports on one service for as long as it runs.

    It runs on the service's own event loop and looks at the loops beside it, so where one of them is stuck
    there is no more sign of life, and the service manager starts the service again.

    Args:
        describe: says in a few words how the service is.
        vital: loops that never rest, by name, each with what gives the time of its last round.
    """

    def __init__(
        self,
        notifier: Notifier | None = None,
        *,
        describe: Callable[[], str] = lambda: "",
        vital: Mapping[str, Callable[[], float]] | None = None,
    ) -> None:
        self._notifier = notifier or Notifier()
        self._describe = describe
        self._vital = dict(vital or {})
        self._stuck: list[str] = []
        self._stops_until: float | None = None
        self.is_starting = self._notifier.is_heard
        """Whether a service manager still waits to be told that the service answers."""

    def watch(self, name: str, last_round: Callable[[], float]) -> None:
        """Have one more loop watched."""
        self._vital[name] = last_round

    def ready(self) -> None:
        """Tell that the service answers."""
        self.is_starting = False
        self._notifier.ready(self._describe())

    def stopping(self, drain_s: float) -> None:
        """Tell that the service stops, for which it drains up to `drain_s` seconds first."""
        self._stops_until = anyio.current_time() + drain_s + STOP_MARGIN_S
        self._notifier.stopping(f"stopping; {self._describe()}", STOP_STEP_S)

    async def run(self) -> NoReturn:
        """Report for ever."""
        if not self._notifier.is_heard:
            await anyio.sleep_forever()
        watchdog_s = self._notifier.watchdog_s
        every_s = STATUS_EVERY_S if watchdog_s is None else min(STATUS_EVERY_S, watchdog_s / 2)
        due = anyio.current_time()
        while True:
            self._report(anyio.current_time() - due)
            due = anyio.current_time() + every_s
            await anyio.sleep(every_s)

    def _report(self, late_s: float = 0.0) -> None:
        """Report once. By what this comes late itself, the loops beside it were held up, and not stuck."""
        now, watchdog_s = anyio.current_time(), self._notifier.watchdog_s
        if self._stops_until is not None:
            if now < self._stops_until:
                self._notifier.extend(STOP_STEP_S)
            self._notifier.status(f"stopping; {self._describe()}")
            return
        stuck = [] if watchdog_s is None else self._stuck_loops(now, watchdog_s / 2 + max(0.0, late_s))
        if stuck != self._stuck:
            self._stuck = stuck
            log.error("loops_stuck", loops=stuck) if stuck else log.info("loops_go_on")
        if stuck:
            self._notifier.status(f"stuck: {', '.join(stuck)}")
            return
        if watchdog_s is not None:
            self._notifier.alive()
        self._notifier.status(self._describe())

    def _stuck_loops(self, now: float, patience_s: float) -> list[str]:
        return [name for name, last_round in self._vital.items() if now - last_round() > patience_s]


def _name(address: str) -> str:
    """Give the address as the kernel takes it; a leading NUL is the abstract namespace."""
    return f"\0{address[1:]}" if address.startswith("@") else address


def _extend(limit_s: float) -> str:
    return f"EXTEND_TIMEOUT_USEC={round(limit_s * 1e6)}"


def _line(text: str) -> str:
    """Keep a text from ending its line, and with it its message."""
    return " ".join(text.split())
