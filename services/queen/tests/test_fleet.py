"""What the queen believes of a hive that announces itself."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from rbee_contracts.errors import Conflict, InvalidRequest, NotFound, Unavailable
from rbee_contracts.nodes import HiveReady
from rbee_queen.fleet import UNREACHABLE_AFTER_S, Fleet


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ready(**changes: object) -> HiveReady:
    values = {"hive_id": "box1", "boot": "b1", "started_at": "t", "version": "0.1.0", "port": 7835}
    return HiveReady(**(values | changes))  # type: ignore[arg-type]


@asynccontextmanager
async def running_fleet(time: Time) -> AsyncIterator[Fleet]:
    fleet = Fleet(time)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fleet.run)
        await anyio.wait_all_tasks_blocked()
        yield fleet
        tasks.cancel_scope.cancel()


async def test_without_a_url_the_peers_address_is_taken() -> None:
    async with running_fleet(Time()) as fleet:
        fleet.announce(ready(), "127.0.0.1")
        fleet.announce(ready(hive_id="box6"), "::1")

        assert [info.url for info in fleet.infos()] == ["http://127.0.0.1:7835", "http://[::1]:7835"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:7835",
        "http://localhost:7835",
        "http://[::1]:7835",
        "ftp://10.0.0.9:7835",
        "http://10.0.0.9",
        "http://user@10.0.0.9:7835",
        "http://10.0.0.9:7835/path",
        "http://10.0.0.9:99999",
        "nonsense",
    ],
)
async def test_a_hive_url_that_cannot_be_meant_is_refused(url: str) -> None:
    async with running_fleet(Time()) as fleet:
        with pytest.raises(InvalidRequest):
            fleet.announce(ready(hive_url=url), "10.0.0.9")

        assert fleet.infos() == []


async def test_a_loopback_url_is_believed_of_a_loopback_peer() -> None:
    async with running_fleet(Time()) as fleet:
        fleet.announce(ready(hive_url="http://127.0.0.1:9"), "127.0.0.1")

        assert fleet.infos()[0].url == "http://127.0.0.1:9"


async def test_silence_makes_a_hive_unreachable_and_takes_no_new_work() -> None:
    time = Time()
    async with running_fleet(time) as fleet:
        fleet.announce(ready(hive_url="http://127.0.0.1:9"), "127.0.0.1")
        assert fleet.infos()[0].state == "connecting"

        time.now += UNREACHABLE_AFTER_S + 1

        assert fleet.infos()[0].state == "unreachable"
        with pytest.raises(Unavailable, match="silent for 6 s"):
            fleet.reachable("box1")


async def test_an_operation_without_hive_id_needs_exactly_one_hive() -> None:
    async with running_fleet(Time()) as fleet:
        with pytest.raises(Unavailable, match="No hive has announced itself"):
            fleet.reachable(None)
        fleet.announce(ready(), "127.0.0.1")
        assert fleet.reachable(None).id == "box1"
        fleet.announce(ready(hive_id="box2", port=7836), "127.0.0.1")
        with pytest.raises(InvalidRequest, match="box1, box2"):
            fleet.reachable(None)
        with pytest.raises(NotFound, match="box1, box2"):
            fleet.reachable("box3")


async def test_another_hive_with_the_id_of_one_that_is_online_is_refused() -> None:
    time = Time()
    async with running_fleet(time) as fleet:
        fleet.announce(ready(), "127.0.0.1")
        hive = fleet.get("box1")
        hive.heartbeat = object()  # type: ignore[assignment]

        with pytest.raises(Conflict, match="already online"):
            fleet.announce(ready(port=9999, boot="b2"), "127.0.0.1")

        time.now += UNREACHABLE_AFTER_S + 1
        fleet.announce(ready(port=9999, boot="b2"), "127.0.0.1")
        assert fleet.get("box1").url == "http://127.0.0.1:9999"
