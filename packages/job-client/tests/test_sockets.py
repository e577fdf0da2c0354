"""What a client's connections notice, and what they are spared."""

import asyncio
import ipaddress
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import anyio
import pytest
from rbee_inprocess import eventually

from rbee_contracts.events import AnyEvent
from rbee_job_client import JobClient, Timeouts, sockets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these options are Linux's")


def test_a_vanished_service_is_noticed_within_fifteen_seconds() -> None:
    assert sockets.PROBE_AFTER_S + sockets.PROBE_EVERY_S <= sockets.UNANSWERED_MS / 1000 <= 15


def test_a_socket_asks_whether_its_peer_is_there() -> None:
    with sockets.open_socket((socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ())) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == sockets.PROBE_AFTER_S
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == sockets.PROBE_EVERY_S
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == sockets.UNANSWERED_MS


_SILENT_SERVICE = """
import socket, sys, time
with socket.create_server((sys.argv[1], 7833)) as listener:
    print("listening", flush=True)
    client, _ = listener.accept()
    client.recv(65536)
    client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\n\\r\\nid: ab12-0\\n\\n")
    time.sleep(60)
"""


@contextmanager
def far_service() -> Iterator[tuple[list[str], str]]:
    """Run a service that says nothing more in a network namespace.

    Gives what runs a command there, and its URL. The network follows from our process id, so that another
    run on this machine has another one.
    """
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command `ip`")
    name, ours = f"rbeec{os.getpid()}", f"rc{os.getpid()}"
    network = ipaddress.ip_address("198.18.0.0") + 4 * (os.getpid() % 2**15)
    here, far = network + 1, network + 2
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
    there = ["ip", "netns", "exec", name]
    try:
        for command in [
            f"ip link add {ours} type veth peer name far netns {name}",
            f"ip addr add {here}/30 dev {ours}",
            f"ip link set {ours} up",
            f"ip -n {name} addr add {far}/30 dev far",
            f"ip -n {name} link set far up",
        ]:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{command}: {done.stderr.strip()}")
        program = [sys.executable, "-c", _SILENT_SERVICE, str(far)]
        service = subprocess.Popen([*there, *program], stdout=subprocess.PIPE)
        try:
            assert service.stdout is not None
            assert service.stdout.readline() == b"listening\n"
            yield there, f"http://{far}:7833"
        finally:
            service.kill()
            service.communicate()
    finally:
        subprocess.run(["ip", "link", "del", ours], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.anyio
async def test_a_service_whose_cable_is_cut_is_noticed_though_it_had_nothing_to_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """F19, with shorter times than the real ones; it was noticed by the read timeout only, after 40 s."""
    monkeypatch.setattr(sockets, "UNANSWERED_MS", 1500)
    monkeypatch.setattr(sockets, "PROBE_AFTER_S", 1)
    monkeypatch.setattr(sockets, "PROBE_EVERY_S", 1)
    connections: list[bool] = []

    async def follow(client: JobClient) -> list[AnyEvent]:
        return [event async for batch in client.follow(on_connection=connections.append) for event in batch]

    with far_service() as (there, url):
        async with JobClient(url, timeouts=Timeouts(connect=600, read=600)) as client:
            task = asyncio.ensure_future(follow(client))
            await eventually(lambda: connections == [True], "it is followed")
            await anyio.run_process([*there, "ip", "addr", "flush", "dev", "far"])
            await eventually(lambda: connections == [True, False], "the loss is noticed")
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@pytest.mark.anyio
async def test_certificates_are_loaded_only_where_there_is_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took each command 22 ms."""
    loaded: list[bool] = []
    create = ssl.create_default_context

    def load(cafile: str | None = None) -> ssl.SSLContext:
        loaded.append(True)
        return create(cafile=cafile)

    monkeypatch.setattr(ssl, "create_default_context", load)
    async with JobClient("http://localhost:7833"):
        assert loaded == []
    async with JobClient("https://localhost:7833"):
        assert loaded == [True]
