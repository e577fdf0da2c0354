"""The table of hives, and the tasks that keep a line to each of them."""

import math
import random
import socket
from collections.abc import Callable, Iterable
from contextlib import aclosing
from typing import NoReturn, Protocol

import anyio
import structlog
from anyio.abc import TaskGroup

from rbee_contracts.errors import Conflict, InvalidRequest, NoCapacity, NotFound, RbeeError, Unavailable
from rbee_contracts.nodes import HiveHeartbeat, HiveInfo, HiveReady
from rbee_job_server.jobs import Job
from rbee_queen.fleet import address
from rbee_queen.fleet.hive import Hive
from rbee_queen.fleet.identity import Incarnation, Verdict, claim
from rbee_queen.fleet.liveness import TICK_EVERY_S, Beat, Effect, Patience, Tick, step
from rbee_queen.fleet.reconcile import SentStep, strays
from rbee_queen.fleet.reconnect import Uniform, delays
from rbee_queen.scheduler import Snapshot, WorkerView
from rbee_queen.store import StoredHive

log = structlog.get_logger(__name__)

RESOLVE_TIMEOUT_S = 5.0
MAX_HIVES = 1000
MAX_FENCED = 1000
"""Boots that are refused; beyond it the oldest are forgotten."""

JOBS_PER_PAGE = 1000


class HiveJournal(Protocol):
    """Where the fleet is written down."""

    def hive_seen(self, hive_id: str, url: str, boot: str) -> None: ...

    def hive_forgotten(self, hive_id: str) -> None: ...


class NotThatHive(RbeeError):
    """Another hive answers at a hive's address."""

    title = "Another hive"
    default_code = "not_that_hive"


class Fleet:
    """The table of hives. `run` must be running; it owns the lines to them.

    Args:
        now: the queen's monotonic clock, in seconds; the only clock that decides anything here.
        token: the cluster's.
        jobs: the queen's own jobs, with which a hive that comes back is compared.
        uniform: where the jitter between attempts comes from.
    """

    def __init__(
        self,
        now: Callable[[], float],
        journal: HiveJournal | None = None,
        token: str | None = None,
        *,
        patience: Patience | None = None,
        jobs: Callable[[], Iterable[Job]] = tuple,
        uniform: Uniform = random.uniform,
    ) -> None:
        self._now = now
        self._token = token
        self._journal = journal
        self._patience = patience or Patience()
        self._jobs = jobs
        self._uniform = uniform
        self._hives: dict[str, Hive] = {}
        self._fenced: dict[str, None] = {}
        self._tasks: TaskGroup | None = None
        self.last_round = math.inf
        """When `run` has last gone through the hives, by the loop's clock."""

    async def run(self) -> None:
        """Own the tasks that follow hives, until cancelled."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            for hive in self._hives.values():
                tasks.start_soon(self._follow, hive)
            while True:
                await anyio.sleep(TICK_EVERY_S)
                self.tick()
                self.last_round = anyio.current_time()

    def restore(self, stored: StoredHive) -> None:
        """Know a hive from the run before; called before `run`, which begins to follow it at once."""
        incarnation = Incarnation(stored.url, stored.boot)
        self._hives[stored.hive_id] = Hive(stored.hive_id, incarnation, "", self._now(), self._token)

    def leave(self) -> None:
        """Leave what runs on the hives running: the queen comes back to it."""
        for hive in self._hives.values():
            hive.relay.leave()

    # --- reading ---------------------------------------------------------------------------------------

    @property
    def hives(self) -> list[Hive]:
        return list(self._hives.values())

    def infos(self) -> list[HiveInfo]:
        now = self._now()
        return [hive.info(now) for hive in self._hives.values()]

    def info(self, hive_id: str) -> HiveInfo:
        """Give what is known of a hive.

        Raises:
            NotFound: the queen has never heard of it.
        """
        return self.get(hive_id).info(self._now())

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

    def reachable(self, hive_id: str | None, *, worker_id: str | None = None) -> Hive:
        """Give the named hive, or the one that has this worker, or the only one there is.

        Raises:
            NotFound: it is not known.
            InvalidRequest: none was named and there are several.
            Unavailable: it cannot be reached now, or there is none.
        """
        hive = self.get(hive_id) if hive_id is not None else self._only(worker_id)
        if hive.state in ("unreachable", "lost"):
            raise Unavailable(
                f"Hive {hive.id} has been silent for {hive.life.silence_s(self._now()):.0f} s; "
                "it is used again as soon as it answers.",
                code="hive_unreachable",
            )
        return hive

    def _only(self, worker_id: str | None) -> Hive:
        having = [hive for hive in self._hives.values() if worker_id and hive.worker(worker_id)]
        # One that is lost may be gone for good; it does not stand in the way of the one that is there.
        there = [hive for hive in self._hives.values() if hive.state != "lost"]
        if not self._hives:
            raise Unavailable(
                "No hive has announced itself to this queen. "
                "Start one: rbee-hive --queen-url URL-OF-THIS-QUEEN",
                code="no_hive",
            )
        for choice in (having, there, list(self._hives.values())):
            if len(choice) == 1:
                return choice[0]
        raise InvalidRequest(
            f"There are several hives; name one with hive_id: {', '.join(self._hives)}.",
            code="hive_id_needed",
        )

    async def settled(self, timeout_s: float) -> None:
        """Wait, for so long at most, until every hive that was only just met has been heard."""
        with anyio.move_on_after(timeout_s):
            for hive in self.hives:
                while hive.state == "connecting":
                    await hive.beaten.wait()

    def snapshot(self) -> Snapshot:
        """Take what the scheduler needs, as it is now."""
        return Snapshot(
            workers=tuple(
                WorkerView(
                    hive_id=hive.id,
                    worker_id=worker.worker_id,
                    model=worker.model,
                    state=worker.state,
                    hive_state=hive.state,
                    is_hive_draining=hive.is_draining,
                    reported=worker.running + worker.waiting,
                    assigned=hive.assigned.get(worker.worker_id, 0),
                )
                for hive in self._hives.values()
                for worker in hive.workers
            )
        )

    # --- announcements ---------------------------------------------------------------------------------

    async def announce(self, ready: HiveReady, peer: str) -> None:
        """Take in a hive that says it is here, and begin to follow it.

        Args:
            peer: the address it spoke from; its URL where it names none.

        Raises:
            InvalidRequest: the URL it names cannot be used.
            Conflict: another hive holds this id, or has taken it over.
            NoCapacity: there are too many hives.
        """
        url = await self._url(ready, peer)
        if self._tasks is None:
            raise Unavailable("The queen is starting; announce again in a moment.")
        claimant = Incarnation(url, ready.boot)
        known = self._hives.get(ready.hive_id)
        verdict = claim(claimant, known.holder if known else None, frozenset(self._fenced))
        if verdict.is_refusal:
            raise self._refusal(verdict, ready.hive_id, claimant)
        if known is not None and verdict in (Verdict.KNOWN, Verdict.RESTARTED):
            # Which boot answers there, its heartbeats will say.
            if known.state != "online":
                known.call()
            return
        if known is not None:
            log.warning("hive_replaced", hive_id=known.id, url=known.url, boot=known.boot, by=url)
            if verdict is Verdict.REPLACES:
                self._fence(known.boot)
            known.scope.cancel()
        elif len(self._hives) >= MAX_HIVES:
            raise NoCapacity(
                f"This queen follows {MAX_HIVES} hives already; it takes no more. "
                "To take one off that is gone for good: rbee hive forget HIVE_ID",
                code="too_many_hives",
            )
        hive = Hive(ready.hive_id, claimant, ready.version, self._now(), self._token)
        self._hives[hive.id] = hive
        self._record(hive)
        log.info("hive_announced", hive_id=hive.id, url=url, boot=ready.boot)
        self._tasks.start_soon(self._follow, hive)

    async def _url(self, ready: HiveReady, peer: str) -> str:
        if ready.hive_url is None:
            return address.own_url(peer, ready.port)
        parts = address.parse(ready.hive_url)
        given = address.literal(parts)
        resolved = [str(given)] if given else await _resolve(parts.hostname or "", parts.port or 0)
        return address.checked_url(parts, resolved, peer, has_token=self._token is not None)

    def _fence(self, boot: str) -> None:
        self._fenced[boot] = None
        while len(self._fenced) > MAX_FENCED:
            del self._fenced[next(iter(self._fenced))]

    def _refusal(self, verdict: Verdict, hive_id: str, claimant: Incarnation) -> Conflict:
        holder = self._hives.get(hive_id)
        where = holder.url if holder else "another address"
        log.warning(
            "hive_refused", hive_id=hive_id, url=claimant.url, boot=claimant.boot, verdict=verdict.name
        )
        if verdict is Verdict.FENCED:
            return Conflict(
                f"Hive {hive_id!r} at {claimant.url} was silent, and the hive at {where} has taken its id. "
                "This one gets no more work. Give it another --hive-id, or stop the other one and start "
                "this one again.",
                code="hive_fenced",
            )
        return Conflict(
            f"Hive {hive_id!r} is already there, at {where}. Give one of the two another --hive-id.",
            code="hive_id_taken",
        )

    def forget(self, hive_id: str) -> HiveInfo:
        """Take a lost hive off the table and out of the journal; give what was known of it.

        It is not fenced: should it be there after all, it announces itself and is new.

        Raises:
            NotFound: the queen has never heard of it.
            Conflict: it is not lost.
        """
        hive = self.get(hive_id)
        info = hive.info(self._now())
        if hive.state != "lost":
            raise Conflict(
                f"Hive {hive.id} is {hive.state}; only one that is lost can be forgotten. "
                "Stop it first; it is lost when it has been silent for "
                f"{self._patience.lost_after_s:g} s.",
                code="hive_not_lost",
                title="Hive not lost",
            )
        del self._hives[hive.id]
        hive.scope.cancel()
        if self._journal is not None:
            self._journal.hive_forgotten(hive.id)
        log.info("hive_forgotten", hive_id=hive.id, url=hive.url, boot=hive.boot, silence_s=info.last_seen_s)
        return info

    def _record(self, hive: Hive) -> None:
        if self._journal is not None:
            self._journal.hive_seen(hive.id, hive.url, hive.boot)

    # --- following -------------------------------------------------------------------------------------

    async def _follow(self, hive: Hive) -> None:
        """Keep the line to a hive: its heartbeats and its events."""
        # The announcement's request started this task; its ids are not ours.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(hive_id=hive.id)
        async with hive.client:
            with hive.scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(hive.relay.run)
                    await self._follow_heartbeats(hive, tasks)
            gone = (
                f"{hive.id} at {hive.url} is gone: it has moved, another hive has taken its id, "
                "or it was forgotten."
            )
            await hive.relay.lose(Unavailable(gone, code="hive_lost"), grace_s=0)

    async def _follow_heartbeats(self, hive: Hive, tasks: TaskGroup) -> NoReturn:
        waits = delays(self._uniform)
        while True:
            heard, announced = False, hive.announced
            try:
                async with aclosing(hive.client.heartbeats("follower=queen", HiveHeartbeat)) as beats:
                    while True:
                        # A line that is silent may be cut without a word; a new one shows whether it is.
                        with anyio.fail_after(self._patience.unreachable_after_s):
                            beat = await anext(beats)
                        is_back = self._take(hive, beat)
                        if is_back or not heard:
                            hive.client.hurry()  # its events too, before it gets work
                            tasks.start_soon(self._reconcile, hive)
                        heard, waits, hive.trouble = True, delays(self._uniform), None
            except RbeeError as exc:
                reason = exc.details
            except TimeoutError:
                reason = f"No heartbeat for {self._patience.unreachable_after_s:g} s."
            if reason != hive.trouble:
                log.info("hive_heartbeats_lost", reason=reason)
                hive.trouble = reason
            with anyio.move_on_after(next(waits)):
                await announced.wait()

    def _take(self, hive: Hive, beat: HiveHeartbeat) -> bool:
        """Take a heartbeat in; say whether the hive had not been there before it.

        Raises:
            NotThatHive: it is another one's.
        """
        if beat.hive_id != hive.id:
            raise NotThatHive(f"At {hive.url} hive {beat.hive_id!r} answers now, not {hive.id!r}.")
        hive.life, effects = step(hive.life, Beat(beat.boot), self._now(), self._patience)
        hive.take(beat)
        if Effect.RESTARTED in effects:
            log.info("hive_restarted", boot=beat.boot)
            self._record(hive)
        if Effect.ONLINE in effects:
            log.info("hive_online", url=hive.url)
        return bool(effects)

    def tick(self) -> None:
        """Let time pass: note which hives have fallen silent, and give up the jobs of those that are lost."""
        now = self._now()
        for hive in self._hives.values():
            hive.life, effects = step(hive.life, Tick(), now, self._patience)
            silence_s = round(hive.life.silence_s(now), 1)
            if Effect.UNREACHABLE in effects:
                log.warning("hive_unreachable", hive_id=hive.id, silence_s=silence_s)
            if Effect.LOST in effects:
                log.warning("hive_lost", hive_id=hive.id, silence_s=silence_s, steps=hive.relay.steps)
                hive.relay.fail_steps(
                    Unavailable(
                        f"Hive {hive.id} has been silent for {silence_s:.0f} s and was given up.",
                        code="hive_lost",
                    )
                )

    # --- reconciling -----------------------------------------------------------------------------------

    async def _reconcile(self, hive: Hive) -> None:
        """Cancel what a hive that is back still runs for us though we have given it up."""
        try:
            for job_id in strays(await _running_on(hive), self._sent_to(hive)):
                if await hive.client.cancel(job_id):
                    log.info("stray_cancelled", lower_job_id=job_id)
        except RbeeError as exc:
            # It is done again when the line is made again, and a hive ends what nobody follows.
            log.warning("hive_not_reconciled", reason=exc.details)

    def _sent_to(self, hive: Hive) -> list[SentStep]:
        found = []
        for job in self._jobs():
            last = {sent.step: sent.attempt for sent in job.steps}
            found += [
                SentStep(
                    lower_job_id=sent.lower_job_id, is_over=job.is_finished or sent.attempt < last[sent.step]
                )
                for sent in job.steps
                if sent.where == hive.id
            ]
        return found


async def _running_on(hive: Hive) -> list[str]:
    """Give the ids of all jobs that have not ended on a hive."""
    found = []
    for state in ("pending", "running"):
        cursor = None
        while True:
            page = await hive.client.list_jobs(state=state, limit=JOBS_PER_PAGE, cursor=cursor)
            found += [job.job_id for job in page.jobs]
            cursor = page.next_cursor
            if cursor is None:
                break
    return found


async def _resolve(host: str, port: int) -> list[str]:
    """Give every address of a host.

    Raises:
        InvalidRequest: it has none.
    """
    try:
        with anyio.fail_after(RESOLVE_TIMEOUT_S):
            found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise InvalidRequest(
            f"hive_url: the queen cannot resolve {host[:100]!r} ({exc}). Give an address instead.",
            code="invalid_hive_url",
        ) from exc
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
