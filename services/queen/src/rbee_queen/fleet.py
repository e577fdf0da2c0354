"""The fleet: which hives there are, what they last told, and the line to each of them."""

from collections.abc import Callable
from contextlib import aclosing
from typing import Literal, Protocol
from urllib.parse import urlsplit

import anyio
import structlog
from anyio.abc import TaskGroup

from rbee_contracts.access import is_loopback
from rbee_contracts.errors import Conflict, InvalidRequest, NotFound, RbeeError, Unavailable
from rbee_contracts.nodes import HiveHeartbeat, HiveInfo, HiveReady
from rbee_job_client import JobClient
from rbee_job_server import Relay
from rbee_queen.scheduler import Snapshot, WorkerView
from rbee_queen.store import StoredHive

log = structlog.get_logger(__name__)

UNREACHABLE_AFTER_S = 5.0
"""Silence after which a hive gets no new work. Heartbeats come every second."""

LOST_AFTER_S = 30.0
"""Silence after which the jobs on a hive end with `hive_lost`."""

RECONNECT_S = 0.5
SEEN_TIMEOUT_S = 3.0
WATCH_EVERY_S = 0.5


class HiveJournal(Protocol):
    """Where the fleet is written down."""

    def hive_seen(self, hive_id: str, url: str, boot: str) -> None: ...


class Hive:
    """One hive. `Fleet` owns it; others read."""

    def __init__(
        self, hive_id: str, url: str, boot: str, version: str, now: float, token: str | None
    ) -> None:
        self.id = hive_id
        self.url = url
        self.boot = boot
        self.version = version
        self.client = JobClient(url, token=token)
        self.relay = self._new_relay()
        self.heartbeat: HiveHeartbeat | None = None
        self.last_seen = now
        self.scope = anyio.CancelScope()
        self.assigned: dict[str, int] = {}
        self.beaten = anyio.Event()
        """Set, and replaced, at each heartbeat."""

    def _new_relay(self) -> Relay:
        return Relay(service="hive", peer=self.id, client=self.client)

    def state(self, now: float) -> Literal["connecting", "online", "unreachable"]:
        if now - self.last_seen > UNREACHABLE_AFTER_S:
            return "unreachable"
        return "connecting" if self.heartbeat is None else "online"

    def info(self, now: float) -> HiveInfo:
        beat = self.heartbeat
        return HiveInfo(
            hive_id=self.id,
            url=self.url,
            state=self.state(now),
            version=self.version,
            last_seen_s=round(now - self.last_seen, 1),
            devices=beat.devices if beat else [],
            workers=beat.workers if beat else [],
            models=beat.models if beat else [],
        )


class Fleet:
    """The table of hives. `run` must be running; it owns the lines to them."""

    def __init__(
        self, now: Callable[[], float], journal: HiveJournal | None = None, token: str | None = None
    ) -> None:
        self._now = now
        self._token = token
        self._journal = journal
        self._hives: dict[str, Hive] = {}
        self._tasks: TaskGroup | None = None

    async def run(self) -> None:
        """Own the tasks that follow hives, until cancelled."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            for hive in self._hives.values():
                tasks.start_soon(self._follow, hive)
            await anyio.sleep_forever()

    def restore(self, stored: StoredHive) -> None:
        """Know a hive from the run before; called before `run`, which begins to follow it."""
        hive = Hive(stored.hive_id, stored.url, stored.boot, "", self._now(), self._token)
        self._hives[hive.id] = hive

    def leave(self) -> None:
        """Leave what runs on the hives running: the queen comes back to it."""
        for hive in self._hives.values():
            hive.relay.leave()

    def infos(self) -> list[HiveInfo]:
        now = self._now()
        return [hive.info(now) for hive in self._hives.values()]

    def get(self, hive_id: str) -> Hive:
        """Give a hive.

        Raises:
            NotFound: the queen has never heard of it.
        """
        hive = self._hives.get(hive_id)
        if hive is None:
            known = ", ".join(self._hives) or "none"
            raise NotFound(
                f"No hive {hive_id!r}. Hives known to this queen: {known}.",
                code="hive_not_found",
                title="Hive not found",
            )
        return hive

    def reachable(self, hive_id: str | None) -> Hive:
        """Give the named hive, or the only one there is.

        Raises:
            NotFound: it is not known, or there is none.
            InvalidRequest: none was named and there are several.
            Unavailable: it cannot be reached now.
        """
        if hive_id is None:
            if not self._hives:
                raise Unavailable(
                    "No hive has announced itself to this queen. "
                    "Start one: rbee-hive --queen-url URL-OF-THIS-QUEEN",
                    code="no_hive",
                )
            if len(self._hives) > 1:
                raise InvalidRequest(
                    f"There are several hives; name one with hive_id: {', '.join(self._hives)}.",
                    code="hive_id_needed",
                )
            hive_id = next(iter(self._hives))
        hive = self.get(hive_id)
        if hive.state(self._now()) == "unreachable":
            raise Unavailable(
                f"Hive {hive_id} has been silent for {self._now() - hive.last_seen:.0f} s; "
                "it is used again as soon as it answers.",
                code="hive_unreachable",
            )
        return hive

    async def until_seen(self, hive: Hive, worker_id: str, *, is_ready: bool) -> None:
        """Wait, a little, until the hive's heartbeats show a worker as ready (or as gone).

        What a job has just done is then true for the next request.
        """
        with anyio.move_on_after(SEEN_TIMEOUT_S):
            while is_ready != any(
                worker.worker_id == worker_id and worker.state == "ready"
                for worker in (hive.heartbeat.workers if hive.heartbeat else [])
            ):
                await hive.beaten.wait()

    def snapshot(self) -> Snapshot:
        """Take what the scheduler needs, as it is now."""
        now = self._now()
        return Snapshot(
            workers=tuple(
                WorkerView(
                    hive_id=hive.id,
                    worker_id=worker.worker_id,
                    model=worker.model,
                    state=worker.state,
                    is_hive_online=hive.state(now) == "online",
                    reported=worker.running + worker.waiting,
                    assigned=hive.assigned.get(worker.worker_id, 0),
                )
                for hive in self._hives.values()
                if hive.heartbeat is not None
                for worker in hive.heartbeat.workers
            )
        )

    def announce(self, ready: HiveReady, peer: str) -> None:
        """Take in a hive that says it is here, and begin to follow it.

        Args:
            peer: the address it spoke from; its URL where it names none.

        Raises:
            InvalidRequest: the URL it names cannot be used.
            Conflict: another hive of this id is online.
        """
        if self._tasks is None:
            raise Unavailable("The queen is starting; announce again in a moment.")
        url = _hive_url(ready, peer)
        known = self._hives.get(ready.hive_id)
        if known is not None:
            if known.url == url and known.boot == ready.boot:
                return
            if known.url != url and known.state(self._now()) == "online":
                raise Conflict(
                    f"Hive {ready.hive_id!r} is already online at {known.url}. "
                    "Give one of the two another --hive-id.",
                    code="hive_id_taken",
                )
            if known.url == url:
                known.boot = ready.boot
                known.version = ready.version
                self._record(known)
                return
            known.scope.cancel()
        hive = Hive(ready.hive_id, url, ready.boot, ready.version, self._now(), self._token)
        self._hives[hive.id] = hive
        self._record(hive)
        log.info("hive_announced", hive_id=hive.id, url=url, boot=ready.boot)
        self._tasks.start_soon(self._follow, hive)

    def _record(self, hive: Hive) -> None:
        if self._journal is not None:
            self._journal.hive_seen(hive.id, hive.url, hive.boot)

    async def _follow(self, hive: Hive) -> None:
        """Keep the line to a hive: its heartbeats, its events, and what its silence means."""
        # The announcement's request started this task; its ids are not ours.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(hive_id=hive.id)
        async with hive.client:
            with hive.scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(hive.relay.run)
                    tasks.start_soon(self._follow_heartbeats, hive)
                    await self._watch(hive)
            await hive.relay.lose(Unavailable(f"Hive {hive.id} has moved.", code="hive_lost"), grace_s=0)

    async def _follow_heartbeats(self, hive: Hive) -> None:
        while True:
            try:
                async with aclosing(hive.client.heartbeats("follower=queen", HiveHeartbeat)) as beats:
                    async for beat in beats:
                        self._take(hive, beat)
            except RbeeError as exc:
                log.info("hive_heartbeats_lost", reason=exc.details)
            await anyio.sleep(RECONNECT_S)

    def _take(self, hive: Hive, beat: HiveHeartbeat) -> None:
        if hive.heartbeat is None or hive.state(self._now()) == "unreachable":
            log.info("hive_online", url=hive.url)
        hive.heartbeat = beat
        hive.boot = beat.boot
        hive.version = beat.version
        hive.last_seen = self._now()
        hive.beaten.set()
        hive.beaten = anyio.Event()

    async def _watch(self, hive: Hive) -> None:
        """Note when a hive falls silent, and give up its jobs when that lasts."""
        was = "connecting"
        gave_up = False
        while True:
            await anyio.sleep(WATCH_EVERY_S)
            silence_s = self._now() - hive.last_seen
            state = hive.state(self._now())
            if state != was and state == "unreachable":
                log.warning("hive_unreachable", silence_s=round(silence_s, 1))
            was = state
            if silence_s <= LOST_AFTER_S:
                gave_up = False
            elif not gave_up:
                gave_up = True
                hive.relay.fail_steps(
                    Unavailable(f"Hive {hive.id} has been silent for {silence_s:.0f} s.", code="hive_lost")
                )


def _hive_url(ready: HiveReady, peer: str) -> str:
    """Where to reach a hive. A loopback URL is believed only of a peer on loopback."""
    if ready.hive_url is None:
        host = f"[{peer}]" if ":" in peer else peer
        return f"http://{host}:{ready.port}"
    try:
        parts = urlsplit(ready.hive_url)
        port = parts.port
    except ValueError as exc:
        raise InvalidRequest(f"hive_url {ready.hive_url[:100]!r}: {exc}", code="invalid_hive_url") from exc
    bare = parts.username is None and parts.path in ("", "/") and not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or not port or not bare:
        raise InvalidRequest(
            f"hive_url {ready.hive_url[:100]!r} is not of the form http://HOST:PORT.", code="invalid_hive_url"
        )
    if is_loopback(parts.hostname) and not is_loopback(peer):
        raise InvalidRequest(
            f"hive_url {ready.hive_url[:100]!r} is this machine's loopback, but the hive speaks from {peer}. "
            "Give it the address others reach it at.",
            code="invalid_hive_url",
        )
    return ready.hive_url.rstrip("/")
