"""What `queen_check` looks at and makes of it. The judgements are pure; `QueenCheck` gathers the facts."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import anyio.to_thread
from msgspec import Struct

from rbee_contracts.access import HOW_TO_MAKE_A_TOKEN, is_loopback
from rbee_contracts.nodes import CheckResult, Finding, HiveInfo
from rbee_job_server import JobContext
from rbee_job_server.jobs import Job
from rbee_queen import VERSION
from rbee_queen.config import QueenConfig
from rbee_queen.fleet import Fleet
from rbee_queen.journal import StoreJournal
from rbee_queen.store import StoreFailed, StoreState

LOW_DISK_BYTES = 2**30
"""Free space on the disk of the database below which the check warns."""

FULL_DISK_BYTES = 64 * 2**20
"""Free space below which the next commits may fail: the queen ends when she cannot write."""

CLOCK_WORTH_A_WORD_S = 5.0
"""Difference of a hive's clock from the queen's that confuses people who read logs. It decides nothing."""


class HiveFacts(Struct, frozen=True, kw_only=True):
    """One hive as the check sees it. `clock_ahead_s` includes the way of the heartbeat.

    `trouble` is why it was not heard when it was last tried.
    """

    info: HiveInfo
    clock_ahead_s: float | None
    trouble: str | None = None


def of_store(state: StoreState | None, failure: str | None) -> Iterator[Finding]:
    """Judge the database: whether it takes writes, what it is, and whether its tables are current."""
    if state is None:
        yield Finding(
            check="store",
            status="failed",
            message=f"The database cannot be used: {failure}",
            remedy="Mend that first: without its database the queen ends.",
        )
        return
    yield Finding(check="store", status="ok", message=f"{state.kind} {state.version} takes writes.")
    is_current = state.revision == state.newest
    yield Finding(
        check="migrations",
        status="ok" if is_current else "failed",
        message=f"The tables are at revision {state.revision}"
        + (", the newest." if is_current else f"; this version needs {state.newest}."),
        remedy=None if is_current else "Restart the queen: she changes the tables when she starts.",
    )


def of_disk(folder: Path | None, free: int | None, total: int | None) -> Iterator[Finding]:
    """Judge the disk of the database, where that is a file of this machine."""
    if folder is None or free is None or total is None:
        yield Finding(check="disk", status="ok", message="The database's disk is its server's.")
        return
    message = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free at {folder}."
    if free >= LOW_DISK_BYTES:
        yield Finding(check="disk", status="ok", message=message)
    else:
        yield Finding(
            check="disk",
            status="warning" if free >= FULL_DISK_BYTES else "failed",
            message=message,
            remedy="Free some space, or keep less history: --keep-days, --keep-jobs.",
        )


async def _disk_of(folder: Path | None) -> list[Finding]:
    if folder is None:
        return list(of_disk(None, None, None))
    try:
        usage = await anyio.to_thread.run_sync(shutil.disk_usage, folder)
    except OSError as exc:
        return [
            Finding(
                check="disk",
                status="failed",
                message=f"The disk of {folder} cannot be looked at: {exc.strerror or exc}.",
                remedy="See that the folder is there and its disk is mounted: the queen ends when she cannot "
                "write.",
            )
        ]
    return list(of_disk(folder, usage.free, usage.total))


def of_access(host: str, *, has_token: bool) -> Iterator[Finding]:
    """Judge who may speak to the queen."""
    if has_token:
        yield Finding(check="access", status="ok", message="Callers need the cluster's token.")
    elif is_loopback(host):
        yield Finding(
            check="access", status="ok", message="There is no token: only this machine is listened to."
        )
    else:
        yield Finding(
            check="access",
            status="failed",
            message=f"The queen listens on {host} without a token: anybody who reaches it may use it.",
            remedy=f"Set a token: {HOW_TO_MAKE_A_TOKEN}.",
        )


def of_hives(hives: Sequence[HiveFacts], version: str) -> Iterator[Finding]:
    """Judge the fleet: who is there, at which version, and how far their clocks are off."""
    if not hives:
        yield Finding(
            check="hives",
            status="failed",
            message="No hive has announced itself, so nothing can run.",
            remedy="Start one on each machine: rbee-hive --queen-url URL-OF-THIS-QUEEN",
        )
    for facts in hives:
        yield from _of_hive(facts, version)


def _of_hive(facts: HiveFacts, version: str) -> Iterator[Finding]:
    info, name = facts.info, f"hive {facts.info.hive_id}"
    silence_s = info.last_seen_s or 0.0
    match info.state:
        case "online":
            draining = " It is draining." if info.draining else ""
            yield Finding(check=name, status="ok", message=f"It is heard at {info.url}.{draining}")
        case "connecting":
            yield Finding(
                check=name,
                status="warning",
                message=f"It has not been heard yet at {info.url}.",
                remedy="Look again in a few seconds.",
            )
        case "unreachable" | "lost":
            yield Finding(
                check=name,
                status="failed",
                message=f"It has been silent for {silence_s:.0f} s at {info.url} ({info.state})."
                + (f" {facts.trouble}" if facts.trouble else ""),
                remedy="See whether rbee-hive runs there, and whether this machine can reach that address."
                + (
                    f" If it is gone for good: rbee hive forget {info.hive_id}"
                    if info.state == "lost"
                    else ""
                ),
            )
    if info.state != "online":
        return
    is_same = info.version == version
    yield Finding(
        check=f"{name}: version",
        status="ok" if is_same else "warning",
        message=f"It runs {info.version}" + ("." if is_same else f", the queen {version}."),
        remedy=None if is_same else "Bring both to one version; the newer one restarts without losing jobs.",
    )
    if facts.clock_ahead_s is not None:
        off_s = abs(facts.clock_ahead_s)
        way = "ahead of" if facts.clock_ahead_s > 0 else "behind"
        is_close = off_s < CLOCK_WORTH_A_WORD_S
        yield Finding(
            check=f"{name}: clock",
            status="ok" if is_close else "warning",
            message=f"Its clock is {off_s:.1f} s {way} the queen's. Nothing is decided by that.",
            remedy=None if is_close else "Set both by NTP, so that times in logs can be compared.",
        )


def of_jobs(pending: int, running: int) -> Iterator[Finding]:
    """Tell how many jobs are open."""
    yield Finding(check="jobs", status="ok", message=f"{running} jobs run and {pending} wait for a reader.")


class QueenCheck:
    """Looks at everything in turn and narrates each finding."""

    def __init__(
        self,
        config: QueenConfig,
        journal: StoreJournal,
        fleet: Fleet,
        jobs: Callable[[], Iterable[Job]],
    ) -> None:
        self._config = config
        self._journal = journal
        self._fleet = fleet
        self._jobs = jobs

    async def run(self, context: JobContext) -> CheckResult:
        """Check the queen, narrating each finding as it is made."""
        findings: list[Finding] = []

        def tell(found: Iterable[Finding]) -> None:
            for finding in found:
                findings.append(finding)
                text = f"{finding.check}: {finding.message}"
                if finding.remedy is not None:
                    text += f" {finding.remedy}"
                context.narrate("queen_check", text, finding)

        state, failure = None, None
        try:
            state = await self._journal.check()
        except StoreFailed as exc:
            failure = str(exc)
        tell(of_store(state, failure))
        if state is not None:
            tell(await _disk_of(state.folder))
        tell(of_access(self._config.host, has_token=self._config.access.token is not None))
        infos = {info.hive_id: info for info in self._fleet.infos()}
        tell(
            of_hives(
                [
                    HiveFacts(info=infos[hive.id], clock_ahead_s=hive.clock_ahead_s, trouble=hive.trouble)
                    for hive in self._fleet.hives
                ],
                VERSION,
            )
        )
        states = [job.state for job in self._jobs() if job is not context.job]
        tell(of_jobs(states.count("pending"), states.count("running")))
        return CheckResult(ok=all(f.status != "failed" for f in findings), findings=findings)
