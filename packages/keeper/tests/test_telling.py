"""What is told while a job runs: progress, findings, details, and losses of the connection."""

import io
from typing import Any

import msgspec
import pytest

from rbee_contracts.events import AnyEvent, DownloadProgress, FileProgress, decode_event
from rbee_contracts.nodes import CheckResult, Finding, MemoryEstimate, WorkerInfo
from rbee_keeper import details
from rbee_keeper.findings import Findings
from rbee_keeper.output import Output
from rbee_keeper.progress import LINE_EVERY_S, Lines, line, name_cells, short
from rbee_keeper.telling import Teller

GIB = 2**30


def progress(done: int, total: int | None = 1000, **more: Any) -> DownloadProgress:
    return DownloadProgress(model="m", bytes_done=done, bytes_total=total, rate=10.0, eta_s=None, **more)


def event(action: str, message: str = "said", **more: Any) -> AnyEvent:
    fields = {
        "action": action,
        "message": message,
        "formatted": f"[queen] {message}",
        "actor": "queen",
        "job_id": "job-00000000-0000-4000-8000-000000000000",
        "correlation_id": "c",
        "timestamp": "2026-01-02T03:04:05Z",
    }
    return decode_event(msgspec.json.encode(fields | more))


def output(*, json: bool = False) -> tuple[Output, io.StringIO, io.StringIO]:
    stdout, stderr = io.StringIO(), io.StringIO()
    return Output(json=json, stdout=stdout, stderr=stderr), stdout, stderr


# --- progress --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (progress(500), "m: 500 B of 1 kB (50%), 10 B/s"),
        (progress(500, None), "m: 500 B, 10 B/s"),
        (progress(5, files_done=1, files_total=2), "m: 5 B of 1 kB (0%), 10 B/s, 1 of 2 files"),
        (msgspec.structs.replace(progress(5), eta_s=61.0), "m: 5 B of 1 kB (0%), 10 B/s, 1:01 to go"),
    ],
    ids=["plain", "unknown-size", "files", "eta"],
)
def test_a_download_in_one_line(given: DownloadProgress, said: str) -> None:
    assert said == line(given)


def test_lines_are_rare_but_the_first_and_the_last_are_there() -> None:
    out, _, stderr = output()
    moments = iter([0.0, 1.0, LINE_EVERY_S, LINE_EVERY_S + 1, LINE_EVERY_S + 2])
    lines = Lines(out, lambda: next(moments))

    for done in (1, 2, 3, 4, 1000):
        lines.show(progress(done))

    assert [text.split()[1] for text in stderr.getvalue().splitlines()] == ["1", "3", "1"]
    assert "(100%)" in stderr.getvalue()


def test_names_before_bars_leave_room_for_the_bar() -> None:
    assert [name_cells(width) for width in (40, 80, 300)] == [12, 36, 60]
    assert (short("aabbc", 3), short("abc", 3), short("a\nb", 3)) == ("…bc", "abc", "a b")


def test_a_download_without_file_progress_is_shown_too() -> None:
    out, _, stderr = output()

    with Teller(out) as tell:
        data = progress(1, current=[FileProgress(path="f", bytes_done=1, bytes_total=None)])
        tell(event("model_download_progress", data=msgspec.to_builtins(data)))

    assert tell.last_progress == data
    assert stderr.getvalue() == "m: 1 B of 1 kB (0%), 10 B/s\n"


# --- who is told what --------------------------------------------------------------------------------------


STREAM = [
    event("execute", "begun"),
    event("odd", "narrated"),
    event("token", "output", index=0),
    event("worker_log", "logged\ntwice"),
    event("error", "why", code="c", retryable=False),
    event("execute_error", "failed", code="c"),
]


@pytest.mark.parametrize(
    ("options", "stdout", "stderr"),
    [
        ({}, "", "[queen] narrated\n"),
        ({"output": True}, "outputlogged\ntwice\n", "[queen] narrated\n"),
        ({"whole": True}, "", "[queen] begun\n[queen] narrated\n[queen] failed\n"),
    ],
    ids=["narration", "output", "whole"],
)
def test_what_is_told_of_a_job(options: dict[str, bool], stdout: str, stderr: str) -> None:
    out, said, told = output()

    with Teller(out, **options) as tell:
        for each in STREAM:
            tell(each)

    assert (said.getvalue(), told.getvalue()) == (stdout, stderr)


@pytest.mark.parametrize(("events", "lines"), [(False, 0), (True, 6)])
def test_a_program_gets_events_only_where_they_are_the_result(events: bool, lines: int) -> None:
    out, said, told = output(json=True)

    with Teller(out, events=events) as tell:
        for each in STREAM:
            tell(each)

    assert (len(said.getvalue().splitlines()), told.getvalue()) == (lines, "")


def test_a_finding_is_shown_once() -> None:
    out, said, _ = output()
    disk = Finding(check="disk", status="ok", message="free")
    hub = Finding(check="hub", status="failed", message="gone", remedy="look")
    findings = Findings(out)

    findings(event("hive_check", data=msgspec.to_builtins(disk)))
    findings(event("hive_check", data={"other": 1}))
    findings(event("execute"))
    findings.end(CheckResult(ok=False, findings=[disk, hub]))

    assert said.getvalue().splitlines() == [
        "ok       disk: free",
        "failed   hub: gone",
        "         What to do: look",
        "",
        "1 ok, 0 warnings, 1 failed.",
    ]


# --- details -----------------------------------------------------------------------------------------------


def worker(**more: Any) -> WorkerInfo:
    fields: dict[str, Any] = {
        "worker_id": "w",
        "model": "m",
        "state": "ready",
        "pid": 7,
        "port": 9300,
        "running": 0,
        "waiting": 0,
        "kv_cache_usage": 0,
        "worker": "cuda",
        "devices": [0],
        "started_at": "2026-01-02T03:04:05Z",
    }
    return WorkerInfo(**fields | more)


ESTIMATE = MemoryEstimate(weights=2 * GIB, kv_cache=GIB, overhead=GIB)


@pytest.mark.parametrize(
    ("memory_used", "said"),
    [
        (None, None),
        (4 * GIB, "4.0 GiB used, as estimated"),
        (3 * GIB, "3.0 GiB used, 1.0 GiB less than estimated (-25%)"),
        (5 * GIB, "5.0 GiB used, 1.0 GiB more than estimated (+25%)"),
    ],
    ids=["unknown", "equal", "less", "more"],
)
def test_the_estimate_against_reality(memory_used: int | None, said: str | None) -> None:
    facts = dict(details.worker("box", worker(memory_estimate=ESTIMATE, memory_used=memory_used)))

    assert said == facts.get("memory")
    assert facts["estimate"] == "4.0 GiB (weights 2.0 GiB, KV cache 1.0 GiB, engine 1.0 GiB)"


def test_what_is_not_known_is_left_out() -> None:
    labels = [label for label, _ in details.worker(None, worker())]

    assert labels == [
        *("worker", "state", "model", "devices", "port", "pid", "started", "requests", "KV cache"),
    ]


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ({"state": "failed", "signal": 9}, ("ended by", "SIGKILL")),
        ({"state": "failed", "signal": 99}, ("ended by", "signal 99")),
        ({"state": "stopped", "exit_code": 0}, ("exit status", "0")),
        ({"signal": 9, "cause": "was ended"}, ("ended before", "SIGKILL, was ended")),
        ({"exit_code": 1}, ("ended before", "exit status 1")),
    ],
    ids=["signal", "unknown-signal", "status", "started-again", "started-again-status"],
)
def test_how_a_worker_ended(ended: dict[str, Any], said: tuple[str, str]) -> None:
    assert said in details.worker("box", worker(**ended))
