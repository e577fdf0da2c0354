"""The commands against a real queen and hive, as real processes."""

import os
import pty
import select
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from rbee_contracts.events import decode_event
from rbee_contracts.jobs import JobRecord
from rbee_contracts.nodes import StatusResult

if TYPE_CHECKING:
    from packages.keeper.tests.conftest import ClusterUnderTest, Sandbox

pytestmark = pytest.mark.timeout(180)
"""The first test of a run starts the services too."""

HANGS_S = 100.0
"""What takes longer hangs."""

UNKNOWN_JOB = "job-00000000-0000-4000-8000-000000000000"


def events_of(stdout: str) -> list[Any]:
    return [decode_event(line) for line in stdout.splitlines()]


# --- infer -----------------------------------------------------------------------------------------------


def test_infer_prints_the_tokens_and_nothing_else(cluster: "ClusterUnderTest") -> None:
    done = cluster.rbee("infer", "--model", cluster.quick, "--max-tokens", "5", "Hello")

    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) == 5
    assert done.stdout.endswith("\n")


def test_infer_verbose_narrates_on_stderr(cluster: "ClusterUnderTest") -> None:
    quiet = cluster.rbee("infer", "-m", cluster.quick, "--max-tokens", "3", "Hello")

    done = cluster.rbee("infer", "-m", cluster.quick, "--max-tokens", "3", "-v", "Hello")

    assert quiet.stdout == done.stdout
    assert "[queen] Inference on quick-model has started." in done.stderr
    assert "[hive/box] Running on" in done.stderr


def test_infer_reads_the_prompt_from_stdin(cluster: "ClusterUnderTest") -> None:
    given = cluster.rbee("infer", "-m", cluster.quick, "--max-tokens", "4", "Hello there")

    piped = cluster.rbee("infer", "-m", cluster.quick, "--max-tokens", "4", "-", stdin="Hello there\n")

    assert piped.returncode == 0
    assert given.stdout == piped.stdout


def test_infer_sends_parameters_and_messages(cluster: "ClusterUnderTest") -> None:
    done = cluster.rbee(
        *(
            "infer",
            "--model",
            cluster.quick,
            "--system",
            "Be brief.",
            "--max-tokens",
            "3",
            "--temperature",
            "0",
        ),
        *("--top-p", "0.5", "--seed", "7", "--stop", "zzz", "--hive-id", "box", "--json", "Hello"),
    )

    assert done.returncode == 0
    assert events_of(done.stdout)[-1].data["usage"]["completion_tokens"] == 3


def test_infer_json_is_one_event_a_line(cluster: "ClusterUnderTest") -> None:
    done = cluster.rbee("--json", "infer", "--model", cluster.quick, "--max-tokens", "3", "Hello")

    assert done.returncode == 0
    assert [
        *("execute", "infer_start", "infer_schedule", "infer_worker", "token", "token", "token"),
        *("infer_complete", "execute_complete"),
    ] == [event.action for event in events_of(done.stdout)]


def test_infer_without_a_worker_fails_with_the_remedy(cluster: "ClusterUnderTest") -> None:
    done = cluster.rbee("infer", "--model", "no-such-model", "Hello")

    assert (done.returncode, done.stdout) == (1, "")
    assert "No worker can run 'no-such-model' now" in done.stderr
    assert "rbee worker spawn --model no-such-model" in done.stderr
    assert done.stderr.count("No worker can run") == 1


def test_infer_failure_in_json_ends_with_the_error(cluster: "ClusterUnderTest") -> None:
    done = cluster.rbee("infer", "--model", "no-such-model", "Hello", "--json")

    assert done.returncode == 1
    assert [event.action for event in events_of(done.stdout)][-2:] == ["error", "execute_error"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_infer_cancels_its_job(cluster: "ClusterUnderTest", signum: signal.Signals) -> None:
    process = cluster.sandbox.start("rbee", "infer", "--model", cluster.slow, "Hello")
    assert process.stdout is not None
    assert process.stdout.read(4)  # the first token is there
    [job] = cluster.jobs("--state", "running", "--operation", "infer")

    process.send_signal(signum)
    _, stderr = process.communicate(timeout=HANGS_S)

    assert (128 + signum, "") == (process.returncode, stderr)
    assert cluster.json("job", "show", str(job["job_id"]))["state"] == "cancelled"


def test_infer_into_a_broken_pipe_ends_quietly_and_cancels(cluster: "ClusterUnderTest") -> None:
    process = cluster.sandbox.start("rbee", "infer", "--model", cluster.slow, "Hello")
    assert process.stdout is not None
    assert process.stdout.read(4)
    [job] = cluster.jobs("--state", "running", "--operation", "infer")

    process.stdout.close()

    assert process.wait(HANGS_S) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert cluster.json("job", "show", str(job["job_id"]))["state"] == "cancelled"


def test_infer_cancelled_by_someone_else_fails(cluster: "ClusterUnderTest") -> None:
    process = cluster.sandbox.start("rbee", "infer", "--model", cluster.slow, "Hello")
    assert process.stdout is not None
    assert process.stdout.read(4)
    [job] = cluster.jobs("--state", "running", "--operation", "infer")

    cancelled = cluster.rbee("job", "cancel", str(job["job_id"]))
    _, stderr = process.communicate(timeout=HANGS_S)

    assert (0, f"{job['job_id']} is cancelled.\n") == (cancelled.returncode, cancelled.stdout)
    assert process.returncode == 1
    assert "Cancelled on request." in stderr


# --- usage and reaching the queen ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["infer", "Hello"], "--model"),
        (["infer", "--model", "m"], "PROMPT"),
        (["infer", "--model", "m", "--max-tokens", "0", "Hello"], "--max-tokens"),
        (["infer", "--model", "m", "--top-p", "2", "Hello"], "<= 1.0"),
        (["infer", "--model", "../etc", "Hello"], "a model id"),
        (["infer", "--model", "m", b"\xff"], "UTF-8"),
        (["worker", "spawn", "--model", "m", "stray"], "stray"),
        (["worker", "spawn", "--model", "m", "--device", "0", "--device", "0"], "twice"),
        (["job", "show", "17"], "no job id"),
        (["job", "stream", UNKNOWN_JOB, "--from", "x"], "<n>-<i>"),
        (["status", "--queen", "ftp://x"], "http://HOST:PORT"),
        (["status", "--queen", "http://a", "--hive", "http://b"], "not both"),
        (["nonsense"], "nonsense"),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_a_usage_error(sandbox: "Sandbox", arguments: list[Any], said: str) -> None:
    done = sandbox.run("rbee", *arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_no_queen_is_said_with_the_remedy(sandbox: "Sandbox") -> None:
    done = sandbox.run("rbee", "status", "--queen", "127.0.0.1:9")

    assert (done.returncode, done.stdout) == (1, "")
    assert "no answer from http://127.0.0.1:9" in done.stderr
    assert "rbee up" in done.stderr


def test_an_error_in_json_is_the_document(sandbox: "Sandbox") -> None:
    done = sandbox.run("rbee", "status", "--queen", "127.0.0.1:9", "--json")

    assert done.returncode == 1
    assert msgspec.json.decode(done.stdout)["code"] == "unreachable"


# --- nodes -----------------------------------------------------------------------------------------------


def test_status_shows_the_cluster(cluster: "ClusterUnderTest") -> None:
    done = cluster.rbee("status")

    assert done.returncode == 0
    for words in (
        "Hives",
        "Devices",
        "Workers",
        "Models",
        cluster.hive_id,
        "cpu:0",
        cluster.slow,
        cluster.quick,
    ):
        assert words in done.stdout


def test_status_json_is_the_result(cluster: "ClusterUnderTest") -> None:
    status = msgspec.convert(cluster.json("status"), StatusResult)

    assert [(cluster.hive_id, "online", 2)] == [(h.hive_id, h.state, len(h.workers)) for h in status.hives]


def test_status_of_one_hive_directly(cluster: "ClusterUnderTest") -> None:
    before = cluster.json("--hive", cluster.hive_url, "status")

    status = msgspec.convert(before, StatusResult)

    assert [(cluster.hive_id, cluster.hive_url)] == [(h.hive_id, h.url) for h in status.hives]
    assert {cluster.quick, cluster.slow} == {worker.model for worker in status.hives[0].workers}


def test_a_hive_asked_directly_shows_that_it_drains(cluster: "ClusterUnderTest") -> None:
    drained = cluster.rbee("--hive", cluster.hive_url, "hive", "drain")
    shown = cluster.rbee("--hive", cluster.hive_url, "hive", "show")
    undone = cluster.rbee("--hive", cluster.hive_url, "hive", "drain", "--undo")

    assert drained.stdout.startswith("The hive takes no new work; ")
    assert "yes: it takes no new work" in shown.stdout
    assert undone.stdout.startswith("The hive takes new work; ")
    cluster.settle()


@pytest.mark.parametrize("command", ["status", "device list"])
def test_a_queen_is_no_hive(cluster: "ClusterUnderTest", command: str) -> None:
    done = cluster.rbee("--hive", cluster.queen_url, *command.split())

    assert (done.returncode, done.stdout) == (1, "")
    assert "is a queen, not a hive. Speak to a queen with --queen." in done.stderr


def test_no_hive_is_said_with_the_remedy(sandbox: "Sandbox") -> None:
    done = sandbox.run("rbee", "status", "--hive", "127.0.0.1:9")

    assert (done.returncode, done.stdout) == (1, "")
    assert "no answer from http://127.0.0.1:9" in done.stderr


@pytest.mark.parametrize("direct", [False, True])
def test_lists_name_the_hive_of_each(cluster: "ClusterUnderTest", direct: bool) -> None:
    whom = ["--hive", cluster.hive_url] if direct else []

    listed = {
        name: msgspec.convert(cluster.json(name, "list", *whom)[f"{name}s"], list[dict[str, Any]])
        for name in ("worker", "model", "device")
    }

    assert {cluster.quick, cluster.slow} == {worker["model"] for worker in listed["worker"]}
    assert [cluster.quick] == [model["model"] for model in listed["model"]]
    assert "cpu" in [device["kind"] for device in listed["device"]]
    assert {cluster.hive_id} == {item["hive_id"] for items in listed.values() for item in items}


def test_plain_lists_are_columns(cluster: "ClusterUnderTest") -> None:
    done = cluster.rbee("hive", "list")

    header, row = done.stdout.splitlines()
    assert header.split()[:3] == ["HIVE", "STATE", "URL"]
    assert [cluster.hive_id, "online", cluster.hive_url] == row.split()[:3]


def test_a_terminal_gets_drawn_tables(cluster: "ClusterUnderTest") -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("rbee")), "worker", "list"],
        env=cluster.sandbox.environ | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], HANGS_S)[0]:
        try:
            shown += os.read(ours, 65536)
        except OSError:
            break
    os.close(ours)

    assert process.wait(HANGS_S) == 0
    assert "─" in shown.decode()
    assert cluster.slow in shown.decode()


def test_spawn_and_stop_a_worker(cluster: "ClusterUnderTest") -> None:
    spawned = cluster.rbee("worker", "spawn", "--model", "third", "--hive-id", "box", "--worker", "cpu")
    worker_id = spawned.stdout.strip()
    listed = cluster.rbee("worker", "list").stdout

    stopped = cluster.rbee("worker", "stop", worker_id)

    assert (spawned.returncode, stopped.returncode) == (0, 0)
    assert "Spawning" in spawned.stderr
    assert worker_id in listed
    assert "has stopped" in stopped.stderr
    assert worker_id not in cluster.rbee("worker", "list").stdout
    cluster.settle()


def test_a_worker_that_cannot_start_fails_the_command(cluster: "ClusterUnderTest") -> None:
    done = cluster.rbee("worker", "spawn", "--model", "broken", "--", "--sim-fail-start")

    assert (done.returncode, done.stdout) == (1, "")
    assert "did not become ready" in done.stderr
    cluster.settle()


def test_interrupted_spawn_stops_the_worker(cluster: "ClusterUnderTest") -> None:
    process = cluster.sandbox.start("rbee", "worker", "spawn", "--model", "late", "--", "--sim-start-s", "50")
    assert process.stderr is not None
    assert "Spawning" in process.stderr.readline()

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=HANGS_S)

    assert process.returncode == 130
    [job] = [job for job in cluster.jobs("--operation", "worker_spawn") if job["model"] == "late"]
    assert job["state"] == "cancelled"
    cluster.settle()


def test_a_worker_is_shown_drained_and_its_log_read(cluster: "ClusterUnderTest") -> None:
    worker_id = cluster.rbee("worker", "spawn", "--model", "fourth").stdout.strip()

    shown = cluster.rbee("worker", "show", worker_id)
    logs = cluster.rbee("worker", "logs", worker_id, "--lines", "3")
    processes = cluster.rbee("worker", "processes")
    drained = cluster.rbee("worker", "drain", worker_id)
    undone = cluster.rbee("worker", "drain", worker_id, "--undo")
    unloaded = cluster.rbee("model", "unload", "fourth")

    assert "state     ready" in shown.stdout
    assert (logs.returncode, len(logs.stdout.splitlines())) == (0, 3)
    assert worker_id in processes.stdout
    assert drained.stdout == f"{worker_id} is draining; 0 running, 0 waiting.\n"
    assert undone.stdout == f"{worker_id} is ready; 0 running, 0 waiting.\n"
    assert unloaded.stdout == f"fourth is out of device memory: {worker_id} is stopped.\n"
    cluster.settle()


def test_a_real_hive_and_the_queen_check_themselves(cluster: "ClusterUnderTest") -> None:
    for command in (("hive", "check"), ("queen", "check")):
        # What is looked at has 5 s to answer, which a busy machine may not have given it the first time.
        for _ in range(3):
            done = cluster.rbee(*command)
            if done.returncode == 0:
                break

        assert "0 failed." in done.stdout
        assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_is_not_ours_is_refused(cluster: "ClusterUnderTest") -> None:
    done = cluster.rbee("worker", "kill", str(os.getpid()), "--yes")

    assert (done.returncode, done.stdout) == (1, "")
    assert "Error: " in done.stderr


def test_stopping_an_unknown_worker_fails(cluster: "ClusterUnderTest") -> None:
    done = cluster.rbee("worker", "stop", "nobody")

    assert done.returncode == 1
    assert "No worker 'nobody'. Workers: " in done.stderr


# --- jobs ------------------------------------------------------------------------------------------------


def infer(cluster: "ClusterUnderTest", tokens: int = 4) -> tuple[str, str]:
    """Run an inference; give its job id and its text."""
    done = cluster.rbee("infer", "--model", cluster.quick, "--max-tokens", str(tokens), "--json", "Hello")
    events = events_of(done.stdout)
    return events[0].job_id, "".join(event.message for event in events if event.action == "token")


def test_job_list_is_filtered_and_paged(cluster: "ClusterUnderTest") -> None:
    first, _ = infer(cluster)
    second, _ = infer(cluster)

    page = cluster.json("job", "list", "--operation", "infer", "--state", "completed", "--limit", "1")
    rest = cluster.json(
        "job", "list", "--operation", "infer", "--limit", "1", "--cursor", str(page["next_cursor"])
    )

    assert [second] == [job.job_id for job in msgspec.convert(page["jobs"], list[JobRecord])]
    assert [first] == [job.job_id for job in msgspec.convert(rest["jobs"], list[JobRecord])]


def test_job_list_for_people_has_a_line_for_each(cluster: "ClusterUnderTest") -> None:
    job_id, _ = infer(cluster)

    done = cluster.rbee("job", "list", "--limit", "1")

    header, row = done.stdout.splitlines()
    assert header.split()[:4] == ["JOB", "OPERATION", "MODEL", "STATE"]
    assert [job_id, "infer", cluster.quick, "completed"] == row.split()[:4]
    assert "--cursor" in done.stderr


def test_job_show_tells_all(cluster: "ClusterUnderTest") -> None:
    job_id, _ = infer(cluster)

    record = msgspec.convert(cluster.json("job", "show", job_id), JobRecord)
    shown = cluster.rbee("job", "show", job_id).stdout

    assert record.usage is not None
    assert record.usage.completion_tokens == 4
    for words in (job_id, "completed", "4 out", record.correlation_id):
        assert words in shown


def test_job_stream_replays_and_resumes(cluster: "ClusterUnderTest") -> None:
    job_id, text = infer(cluster)

    whole = cluster.rbee("job", "stream", job_id)
    rest = cluster.rbee("job", "stream", job_id, "--from", "4-2")
    nothing = cluster.rbee("job", "stream", job_id, "--from", "6-4", "--json")

    assert (0, f"{text}\n") == (whole.returncode, whole.stdout)
    assert "infer completed." in whole.stderr
    assert f"{''.join(text.partition(' ')[::1])}".endswith(rest.stdout.rstrip("\n"))
    assert len(rest.stdout.split()) == 2
    assert (nothing.returncode, nothing.stdout) == (0, "")


def test_job_stream_of_a_failed_job_fails(cluster: "ClusterUnderTest") -> None:
    failed = cluster.rbee("infer", "--model", "no-such-model", "Hello", "--json")
    job_id = events_of(failed.stdout)[0].job_id

    streamed = cluster.rbee("job", "stream", job_id)
    behind_the_end = cluster.rbee("job", "stream", job_id, "--from", "99-0")

    assert (streamed.returncode, behind_the_end.returncode) == (1, 1)
    assert "No worker can run" in streamed.stderr
    assert "No worker can run" in behind_the_end.stderr


def test_cancelling_what_has_ended_or_never_was_fails(cluster: "ClusterUnderTest") -> None:
    job_id, _ = infer(cluster)

    ended = cluster.rbee("job", "cancel", job_id)
    unknown = cluster.rbee("job", "cancel", UNKNOWN_JOB)

    assert (ended.returncode, unknown.returncode) == (1, 1)
    assert "has already completed" in ended.stderr
    assert "rbee job list" in unknown.stderr


def test_narration_goes_before_output_in_order(cluster: "ClusterUnderTest") -> None:
    job_id, _ = infer(cluster)

    done = cluster.rbee("job", "stream", job_id, "--json")

    stamps = [event.timestamp for event in events_of(done.stdout)]
    assert all(earlier <= later for earlier, later in pairwise(stamps))
