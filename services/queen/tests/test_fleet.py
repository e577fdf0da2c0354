"""What the queen believes of a hive that announces itself, and what its silence means."""

import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

import anyio
import pytest
from rbee_inprocess import eventually
from rbee_many_hives import FakeHive
from rbee_ports import HeldPort

from rbee_contracts.errors import Conflict, InvalidRequest, NoCapacity, NotFound, Unavailable
from rbee_contracts.nodes import HiveHeartbeat, HiveReady, WorkerInfo
from rbee_job_client import client
from rbee_queen.fleet import LOST_AFTER_S, UNREACHABLE_AFTER_S, Fleet, Hive
from rbee_queen.fleet import fleet as fleet_module
from rbee_queen.fleet.liveness import TICK_EVERY_S
from rbee_queen.store import StoredHive


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, fleet: Fleet, seconds: float) -> None:
        """Let time go by as the fleet's own loop sees it."""
        for _ in range(int(seconds / TICK_EVERY_S)):
            self.now += TICK_EVERY_S
            fleet.tick()


class Journal:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []
        self.forgotten: list[str] = []

    def hive_seen(self, hive_id: str, url: str, boot: str) -> None:
        self.seen.append((hive_id, url, boot))

    def hive_forgotten(self, hive_id: str) -> None:
        self.forgotten.append(hive_id)


def ready(**changes: object) -> HiveReady:
    values = {"hive_id": "box1", "boot": "b1", "started_at": "t", "version": "0.1.0", "port": 7835}
    return HiveReady(**(values | changes))  # type: ignore[arg-type]


def heartbeat(boot: str = "b1", **changes: object) -> HiveHeartbeat:
    values = {
        "hive_id": "box1",
        "boot": boot,
        "version": "0.2.0",
        "timestamp": "2026-01-01T00:00:00.000+00:00",
        "devices": [],
        "workers": [],
        "models": [],
    }
    return HiveHeartbeat(**(values | changes))  # type: ignore[arg-type]


def worker(worker_id: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        model="m",
        state="ready",
        pid=1,
        port=9300,
        worker="cpu",
        devices=[0],
        running=0,
        waiting=0,
        kv_cache_usage=0.0,
        started_at="t",
    )


def hear(fleet: Fleet, hive_id: str = "box1", boot: str = "b1", **changes: object) -> Hive:
    """Have a hive's heartbeat come in."""
    hive = fleet.get(hive_id)
    fleet._take(hive, heartbeat(boot, hive_id=hive_id, **changes))
    return hive


@asynccontextmanager
async def running_fleet(
    time: Time, *, token: str | None = None, journal: Journal | None = None
) -> AsyncIterator[Fleet]:
    fleet = Fleet(time, journal, token)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fleet.run)
        await anyio.wait_all_tasks_blocked()
        yield fleet
        tasks.cancel_scope.cancel()


async def test_without_a_url_the_peers_address_is_taken() -> None:
    async with running_fleet(Time()) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        await fleet.announce(ready(hive_id="box6"), "::1")

        assert [info.url for info in fleet.infos()] == ["http://127.0.0.1:7835", "http://[::1]:7835"]


async def test_a_name_is_resolved_and_the_address_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "RESOLVE_TIMEOUT_S", 45.0)
    async with running_fleet(Time()) as fleet:
        await fleet.announce(ready(hive_url="http://localhost:9"), "127.0.0.1")

        assert fleet.infos()[0].url in ("http://127.0.0.1:9", "http://[::1]:9")


async def test_a_name_that_does_not_resolve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a machine's own resolver says of it, and after how many seconds, differs.
    async def fail(*_: object, **__: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(anyio, "getaddrinfo", fail)
    async with running_fleet(Time()) as fleet:
        with pytest.raises(InvalidRequest, match=r"cannot resolve .no-such-host\.invalid"):
            await fleet.announce(ready(hive_url="http://no-such-host.invalid:9"), "127.0.0.1")

        assert fleet.infos() == []


async def test_a_queen_that_is_starting_says_so() -> None:
    with pytest.raises(Unavailable, match="starting"):
        await Fleet(Time()).announce(ready(), "127.0.0.1")


async def test_silence_makes_a_hive_unreachable_and_then_lost() -> None:
    time = Time()
    async with running_fleet(time) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        assert fleet.infos()[0].state == "connecting"
        hive = hear(fleet)
        assert fleet.infos()[0].state == "online"

        time.passes(fleet, UNREACHABLE_AFTER_S + 1)
        assert fleet.infos()[0].state == "unreachable"
        with pytest.raises(Unavailable, match="silent for 6 s"):
            fleet.reachable("box1")

        time.passes(fleet, LOST_AFTER_S)
        assert fleet.infos()[0].state == "lost"

        hear(fleet)
        assert fleet.reachable("box1") is hive


async def test_an_operation_without_hive_id_needs_exactly_one_hive() -> None:
    time = Time()
    async with running_fleet(time) as fleet:
        with pytest.raises(Unavailable, match="No hive has announced itself"):
            fleet.reachable(None)
        await fleet.announce(ready(), "127.0.0.1")
        assert fleet.reachable(None).id == "box1"
        await fleet.announce(ready(hive_id="box2", port=7836), "127.0.0.1")
        with pytest.raises(InvalidRequest, match="box1, box2"):
            fleet.reachable(None)
        with pytest.raises(NotFound, match="box1, box2"):
            fleet.reachable("box3")


async def test_a_hive_that_is_lost_does_not_stand_in_the_way_of_the_only_one_that_is_there() -> None:
    time = Time()
    async with running_fleet(time) as fleet:
        await fleet.announce(ready(hive_id="gone", port=1), "127.0.0.1")
        time.passes(fleet, LOST_AFTER_S + UNREACHABLE_AFTER_S)
        with pytest.raises(Unavailable, match="Hive gone has been silent"):
            fleet.reachable(None)
        await fleet.announce(ready(), "127.0.0.1")

        assert fleet.reachable(None).id == "box1"


async def test_a_worker_names_its_hive() -> None:
    async with running_fleet(Time()) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        await fleet.announce(ready(hive_id="box2", boot="b2", port=7836), "127.0.0.1")
        hear(fleet, workers=[worker("w1")])
        hear(fleet, "box2", "b2", workers=[worker("w2")])

        assert fleet.reachable(None, worker_id="w2").id == "box2"
        with pytest.raises(InvalidRequest, match="several hives"):
            fleet.reachable(None, worker_id="w3")


async def test_another_hive_with_the_id_of_one_that_is_online_is_refused() -> None:
    """F38."""
    time, journal = Time(), Journal()
    async with running_fleet(time, journal=journal) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        hear(fleet)

        with pytest.raises(Conflict, match=r"already there, at http://127\.0\.0\.1:7835") as refused:
            await fleet.announce(ready(port=9999, boot="b2"), "127.0.0.1")
        assert refused.value.code == "hive_id_taken"

        time.passes(fleet, UNREACHABLE_AFTER_S + 1)
        await fleet.announce(ready(port=9999, boot="b2"), "127.0.0.1")
        assert fleet.get("box1").url == "http://127.0.0.1:9999"
        assert journal.seen == [
            ("box1", "http://127.0.0.1:7835", "b1"),
            ("box1", "http://127.0.0.1:9999", "b2"),
        ]


async def test_the_hive_that_was_replaced_is_told_so_and_gets_its_id_back_only_by_a_new_start() -> None:
    """F38: fenced by its boot, also when the other one has fallen silent meanwhile."""
    time = Time()
    async with running_fleet(time) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        old = hear(fleet)
        time.passes(fleet, UNREACHABLE_AFTER_S + 1)
        await fleet.announce(ready(port=9999, boot="b2"), "127.0.0.1")
        hear(fleet, boot="b2")

        for _ in range(2):
            with pytest.raises(
                Conflict, match=r"127\.0\.0\.1:9999 has taken its id.*another --hive-id"
            ) as told:
                await fleet.announce(ready(), "127.0.0.1")
            assert told.value.code == "hive_fenced"
            time.passes(fleet, UNREACHABLE_AFTER_S + 1)
        await anyio.wait_all_tasks_blocked()
        assert old.scope.cancel_called

        await fleet.announce(ready(boot="b3"), "127.0.0.1")
        assert fleet.get("box1").url == "http://127.0.0.1:7835"


async def test_another_boot_at_the_same_address_is_a_restart() -> None:
    time, journal = Time(), Journal()
    async with running_fleet(time, journal=journal) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        hive = hear(fleet)
        await fleet.announce(ready(boot="b2"), "127.0.0.1")
        hear(fleet, boot="b2")

        assert fleet.get("box1") is hive
        assert (hive.boot, hive.version) == ("b2", "0.2.0")
        assert journal.seen[-1] == ("box1", "http://127.0.0.1:7835", "b2")


async def test_the_same_boot_at_another_address_has_moved() -> None:
    time = Time()
    async with running_fleet(time) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        hear(fleet)
        await fleet.announce(ready(port=9999), "127.0.0.1")
        assert fleet.get("box1").url == "http://127.0.0.1:7835"

        time.passes(fleet, UNREACHABLE_AFTER_S + 1)
        await fleet.announce(ready(port=9999), "127.0.0.1")
        assert fleet.get("box1").url == "http://127.0.0.1:9999"
        await fleet.announce(ready(port=9999), "127.0.0.1")


async def test_another_hive_that_answers_at_a_hives_address_is_not_taken_for_it() -> None:
    async with running_fleet(Time()) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        with pytest.raises(fleet_module.NotThatHive, match="hive 'box9' answers now"):
            fleet._take(fleet.get("box1"), heartbeat(hive_id="box9"))

        assert fleet.infos()[0].state == "connecting"


async def test_a_stored_hive_holds_its_id_until_it_has_been_silent() -> None:
    time = Time()
    fleet = Fleet(time)
    fleet.restore(StoredHive(hive_id="box1", url="http://127.0.0.1:1", boot="b1"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fleet.run)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(Conflict):
            await fleet.announce(ready(boot="b2"), "127.0.0.1")
        time.passes(fleet, UNREACHABLE_AFTER_S + 1)
        await fleet.announce(ready(boot="b2"), "127.0.0.1")
        tasks.cancel_scope.cancel()

    assert fleet.get("box1").url == "http://127.0.0.1:7835"


async def test_hives_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "MAX_HIVES", 2)
    async with running_fleet(Time()) as fleet:
        for number in range(2):
            await fleet.announce(ready(hive_id=f"box{number}", port=1 + number), "127.0.0.1")
        with pytest.raises(NoCapacity, match="follows 2 hives"):
            await fleet.announce(ready(hive_id="box9"), "127.0.0.1")


async def test_what_a_hive_tells_stands_in_the_fleets_list() -> None:
    time = Time()
    async with running_fleet(time) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        hear(fleet, draining=True, labels={"rack": "7"})
        info = fleet.info("box1")

        assert (info.draining, info.labels, info.boot, info.version) == (True, {"rack": "7"}, "b1", "0.2.0")
        assert fleet.snapshot().workers == ()
        hive = hear(fleet, workers=[worker("w1")])
        (view,) = fleet.snapshot().workers
        assert (view.hive_state, view.is_hive_draining, view.state) == ("online", False, "ready")
        assert hive.clock_ahead_s is not None
        assert hear(fleet, timestamp="now").clock_ahead_s is None
        assert hear(fleet, timestamp="2026-01-01T00:00:00").clock_ahead_s is None


async def test_a_hive_that_is_heard_again_is_followed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """F36: its events come by a line of their own; work would fail that came before that line was there."""
    monkeypatch.setattr(client, "backoff_s", lambda: itertools.repeat(3600.0))
    with HeldPort() as held:
        box = FakeHive("box1", port=held.number)
        async with running_fleet(Time()) as fleet:
            await fleet.announce(ready(port=held.number, boot="boot-box1"), "127.0.0.1")
            hive = fleet.get("box1")
            await eventually(lambda: hive.trouble, "the queen has tried in vain")
            await box.start()
            await eventually(lambda: hive.state == "online" and hive.relay.is_connected, "it is followed")
            await box.stop()


async def test_a_lost_hive_is_forgotten_and_is_new_when_it_announces_itself_again() -> None:
    time, journal = Time(), Journal()
    async with running_fleet(time, journal=journal) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        hear(fleet)
        time.passes(fleet, LOST_AFTER_S + 1)
        known = fleet.forget("box1")

        assert (known.hive_id, known.state, known.boot) == ("box1", "lost", "b1")
        assert (fleet.infos(), journal.forgotten) == ([], ["box1"])
        with pytest.raises(NotFound):
            fleet.forget("box1")

        await fleet.announce(ready(), "127.0.0.1")
        assert [info.state for info in fleet.infos()] == ["connecting"]
        assert [hive_id for hive_id, _, boot in journal.seen if boot == "b1"] == ["box1", "box1"]


@pytest.mark.parametrize("silent_s", [None, 0, UNREACHABLE_AFTER_S + 1], ids=["new", "heard", "unreachable"])
async def test_a_hive_that_is_not_lost_cannot_be_forgotten(silent_s: float | None) -> None:
    time, journal = Time(), Journal()
    async with running_fleet(time, journal=journal) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        if silent_s is not None:
            hear(fleet)
            time.passes(fleet, silent_s)
        with pytest.raises(Conflict, match=f"silent for {LOST_AFTER_S:g} s") as refused:
            fleet.forget("box1")

        assert refused.value.code == "hive_not_lost"
        assert [info.hive_id for info in fleet.infos()] == ["box1"]
        assert journal.forgotten == []


async def test_a_queen_that_stood_still_blames_no_hive() -> None:
    time = Time()
    async with running_fleet(time) as fleet:
        await fleet.announce(ready(), "127.0.0.1")
        hear(fleet)
        time.now += 10 * LOST_AFTER_S
        fleet.tick()
        time.passes(fleet, 1)

        assert fleet.infos()[0].state == "online"
