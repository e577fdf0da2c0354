"""What is told to the service manager: the protocol on a real socket, and when a sign of life is withheld."""

import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import anyio
import pytest
from rbee_inprocess import PATIENCE_S

from rbee_job_server import systemd
from rbee_job_server.systemd import NOTIFY_VARIABLES, UNSENT_LIMIT, Notifier, Reporter

SCRIPT = Path(__file__).parent / "small_service.py"


class ServiceManager:
    """The other end: what it has been told so far, message by message."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self.socket.settimeout(PATIENCE_S)

    def message(self) -> dict[str, str]:
        """Wait for the next message."""
        lines = self.socket.recv(65536).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def messages(self) -> list[dict[str, str]]:
        """Give all that came meanwhile."""
        found = []
        self.socket.setblocking(False)
        try:
            while True:
                found.append(self.message())
        except BlockingIOError:
            return found
        finally:
            self.socket.settimeout(PATIENCE_S)

    def until(self, name: str, pattern: str = "") -> dict[str, str]:
        """Read on to a message with this name, and a value of this pattern."""
        while True:
            message = self.message()
            if name in message and re.search(pattern, message[name]):
                return message

    def notifier(self, **environ: str) -> Notifier:
        return Notifier.of({"NOTIFY_SOCKET": self.address} | environ, os.getpid())


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[ServiceManager]:
    # Not in tmp_path: the address of a socket has 108 bytes at most.
    with tempfile.TemporaryDirectory(prefix="rbee-", dir="/tmp") as folder:
        address = f"{folder}/notify" if request.param == "path" else f"@rbee-{uuid.uuid4().hex}"
        made = ServiceManager(address)
        with closing(made.socket):
            yield made


def test_each_word_is_one_datagram(manager: ServiceManager) -> None:
    notifier = manager.notifier()
    notifier.starting("opening the database", 600)
    notifier.ready("hives online: 0 of 0")
    notifier.status("hives online: 0 of 0")  # no news
    notifier.status("hives online:\n1 of 1\n")
    notifier.alive()
    notifier.stopping("stopping", 20)
    notifier.extend(7.5)

    assert manager.messages() == [
        {"STATUS": "opening the database", "EXTEND_TIMEOUT_USEC": "600000000"},
        {"READY": "1", "STATUS": "hives online: 0 of 0"},
        {"STATUS": "hives online: 1 of 1"},
        {"WATCHDOG": "1"},
        {"STOPPING": "1", "STATUS": "stopping", "EXTEND_TIMEOUT_USEC": "20000000"},
        {"EXTEND_TIMEOUT_USEC": "7500000"},
    ]


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
        ({}, None),
    ],
    ids=["watched", "us", "another", "zero", "word", "superscript", "none"],
)
def test_the_watchdog_is_fed_only_by_whom_it_watches(
    environ: dict[str, str], watchdog_s: float | None
) -> None:
    assert Notifier.of({"NOTIFY_SOCKET": "/nowhere"} | environ, 7).watchdog_s == watchdog_s
    assert Notifier.of(environ, 7).watchdog_s is None


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative"])
def test_where_nobody_listens_nothing_is_told(address: str) -> None:
    notifier = Notifier.of({"NOTIFY_SOCKET": address}, os.getpid())
    notifier.ready("there")

    assert not notifier.is_heard


def test_a_socket_that_is_gone_stops_nothing(manager: ServiceManager) -> None:
    notifier = manager.notifier()
    notifier.ready("there")
    manager.socket.close()
    if manager.address.startswith("/"):
        os.unlink(manager.address)
    for _ in range(3 * UNSENT_LIMIT):
        notifier.alive()
    notifier.status("still going")


def test_what_the_service_manager_was_too_busy_for_comes_later(manager: ServiceManager) -> None:
    notifier = manager.notifier()
    told = 0
    while not notifier._unsent:  # until its queue is full
        notifier.status(f"{told}")
        told += 1
    notifier.ready("there")
    first = manager.messages()
    notifier.alive()
    rest = manager.messages()

    assert [message["STATUS"] for message in first] == [f"{n}" for n in range(told - 1)]
    assert rest == [{"STATUS": f"{told - 1}"}, {"READY": "1", "STATUS": "there"}, {"WATCHDOG": "1"}]


async def test_a_sign_of_life_comes_at_half_of_the_watchdogs_time(manager: ServiceManager) -> None:
    waits: list[float] = []
    sleep = anyio.sleep

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    notifier = manager.notifier(WATCHDOG_USEC="3000000")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anyio, "sleep", note)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Reporter(notifier, describe=lambda: "well").run)
            while len(waits) < 4:
                await sleep(0)
            tasks.cancel_scope.cancel()
    told = manager.messages()

    assert set(waits) == {1.5}
    assert told[:2] == [{"WATCHDOG": "1"}, {"STATUS": "well"}]
    assert told[2:] == [{"WATCHDOG": "1"}] * (len(told) - 2)


async def test_a_loop_that_is_stuck_keeps_the_sign_of_life_back(manager: ServiceManager) -> None:
    reporter = Reporter(
        manager.notifier(WATCHDOG_USEC="200000000"),
        describe=lambda: "well",
        vital={"workers": lambda: last_round},
    )
    last_round = anyio.current_time()
    reporter._report()
    last_round -= 101.0
    reporter._report()
    reporter._report()
    reporter.watch("jobs", lambda: -math.inf)
    reporter._report()
    stuck = manager.messages()
    last_round = anyio.current_time()
    reporter.watch("jobs", anyio.current_time)
    reporter._report()

    assert stuck == [
        {"WATCHDOG": "1"},
        {"STATUS": "well"},
        {"STATUS": "stuck: workers"},
        {"STATUS": "stuck: workers, jobs"},
    ]
    assert manager.messages() == [{"WATCHDOG": "1"}, {"STATUS": "well"}]


async def test_an_event_loop_that_stood_still_does_not_make_its_loops_stuck(manager: ServiceManager) -> None:
    """After a long import, say, all are late alike; a sign of life withheld then would cost the service."""
    last_round = anyio.current_time() - 140.0
    reporter = Reporter(manager.notifier(WATCHDOG_USEC="200000000"), vital={"workers": lambda: last_round})
    reporter._report(late_s=90.0)
    on_time = manager.messages()
    reporter._report()

    assert {"WATCHDOG": "1"} in on_time
    assert manager.messages() == [{"STATUS": "stuck: workers"}]


async def test_while_it_stops_it_asks_for_time_and_not_for_ever(
    manager: ServiceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = Reporter(manager.notifier(WATCHDOG_USEC="20000000"), describe=lambda: "1 job")
    reporter.stopping(drain_s=30.0)
    reporter._report()
    now = anyio.current_time()
    monkeypatch.setattr(anyio, "current_time", lambda: now + 30.0 + systemd.STOP_MARGIN_S + 1)
    reporter._report()

    assert manager.messages() == [
        {"STOPPING": "1", "STATUS": "stopping; 1 job", "EXTEND_TIMEOUT_USEC": "20000000"},
        {"EXTEND_TIMEOUT_USEC": "20000000"},
    ]


def test_a_service_is_ready_when_it_answers_and_says_that_it_stops(manager: ServiceManager) -> None:
    """The whole of `serve`, in a process: ready comes after the port answers, stopping before the end."""
    environ = os.environ | {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "2000000"}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", SCRIPT, "0", "5"],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert manager.message() == {"READY": "1", "STATUS": "small"}
        manager.until("WATCHDOG")
        manager.until("WATCHDOG")
        process.terminate()
        stopping = manager.until("STOPPING")

        assert stopping["STATUS"] == "stopping; small"
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


def test_a_start_that_is_broken_off_leaves_what_runs_to_the_next(manager: ServiceManager) -> None:
    """At a second restart during a start systemd sends SIGTERM alone; what was taken up is to live on."""
    command = [sys.executable, "-W", "error", str(SCRIPT), "0", "5", "broken-off"]
    environ = os.environ | {"NOTIFY_SOCKET": manager.address}
    done = subprocess.run(command, env=environ, capture_output=True, timeout=PATIENCE_S, check=False)

    assert done.returncode == 0, done.stderr
    told = {name for message in manager.messages() for name in message}
    assert "STOPPING" in told
    assert "READY" not in told


def test_children_are_not_to_speak_for_their_parent() -> None:
    assert {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} == NOTIFY_VARIABLES
