"""The commands that change something, against a service that plays their parts."""

import re
from typing import TYPE_CHECKING

import msgspec
import pytest

from rbee_contracts.events import decode_event
from rbee_contracts.jobs import JobRecord

if TYPE_CHECKING:
    from packages.keeper.tests.conftest import ScriptedService

pytestmark = pytest.mark.timeout(180)
"""The first test of a run starts the services too."""


def test_a_download_in_a_pipe_is_a_plain_line_now_and_then(scripted: "ScriptedService") -> None:
    done = scripted.rbee("model", "download", "org/quick")

    assert (done.returncode, done.stdout) == (0, "org/quick\n")
    lines = done.stderr.splitlines()
    assert lines[0] == "[queen] Fetching org/quick: 3 files, 3.4 GB."
    # The first steps are one where the service was held up before its first write.
    assert re.fullmatch(
        r"org/quick: [0-9.]+ [MG]B of 3\.4 GB \([0-9]+%\), 45\.6 MB/s, [0-9]:[0-9]{2} to go, [12] of 3 files",
        lines[1],
    )
    assert "org/quick: 3.4 GB of 3.4 GB (100%), 45.6 MB/s, 0:00 to go, 2 of 3 files" in lines
    assert lines[-1] == "[queen] org/quick is complete."
    assert len(lines) < 10


def test_a_download_in_json_is_its_events(scripted: "ScriptedService") -> None:
    done = scripted.rbee("model", "download", "org/quick", "--json")

    actions = [decode_event(line).action for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, "")
    assert actions[:2] == ["execute", "model_download_start"]
    assert "model_download_progress" in actions
    assert actions[-1] == "execute_complete"


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_download_at_a_terminal_has_bars(scripted: "ScriptedService", columns: int) -> None:
    shown = scripted.terminal("model", "download", "org/quick", columns=columns)

    assert shown.end() == 0
    bars = [line for line in shown.text.splitlines() if "━" in line]
    assert bars
    assert max(map(len, bars)) <= columns
    assert any(line.rstrip().endswith("45.6 MB/s    0:39") for line in bars)
    assert any("-of-00002.safetensors"[-11:] in line for line in bars)
    if columns >= 80:
        assert any(line.startswith("1 of 3 files, 1.6 GB of 3.4 GB") for line in bars)
    assert "[queen] org/quick is complete." in shown.text
    assert shown.raw.count("\x1b[?25h") == 1, "the cursor is shown again"


def test_a_dumb_terminal_gets_lines(scripted: "ScriptedService") -> None:
    shown = scripted.terminal("model", "download", "org/quick", TERM="dumb")

    assert shown.end() == 0
    assert "45.6 MB/s, 0:00 to go, 2 of 3 files" in shown.text
    assert "\x1b" not in shown.raw


def test_ctrl_c_cancels_a_download_and_says_what_is_kept(scripted: "ScriptedService") -> None:
    shown = scripted.terminal("model", "download", "org/endless", "--hive-id", "box1")
    shown.until("1.6 GB of 3.4 GB")

    shown.type("\x03")

    assert shown.end() == 130
    assert "Cancelled. 1.6 GB were fetched and are kept; the same command goes on from there." in shown.text
    assert last_download(scripted).state == "cancelled"


def test_a_download_that_fails_leaves_the_terminal_in_order(scripted: "ScriptedService") -> None:
    shown = scripted.terminal("model", "download", "org/broken")

    assert shown.end() == 1
    assert shown.text.rstrip().endswith("Error: The hub answered 503. Try again later.")
    assert shown.raw.rindex("\x1b[?25h") < shown.raw.index("Error: ")


def test_a_detached_download_goes_on(scripted: "ScriptedService") -> None:
    done = scripted.rbee("model", "download", "org/endless", "--detach")

    job_id = done.stdout.strip()
    assert done.returncode == 0
    assert f"rbee job stream {job_id}" in done.stderr
    assert last_download(scripted).job_id == job_id
    assert last_download(scripted).state == "running"
    assert scripted.rbee("job", "cancel", job_id).returncode == 0


def last_download(scripted: "ScriptedService") -> JobRecord:
    page = scripted.json("job", "list", "--operation", "model_download", "--limit", "1")
    [job] = msgspec.convert(page["jobs"], list[JobRecord])
    return job


def test_job_stream_shows_bars_too(scripted: "ScriptedService") -> None:
    job_id = scripted.rbee("model", "download", "org/quick", "--detach").stdout.strip()

    shown = scripted.terminal("job", "stream", job_id)

    assert shown.end() == 0
    assert "model_download completed." in shown.text


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ("y\n", 0, "small is deleted; 1.84 MB are free again."),
        ("n\n", 1, "Nothing was done."),
        ("\n", 1, "Nothing was done."),
        ("\x03", 130, "Nothing was done."),
    ],
    ids=["yes", "no", "enter", "ctrl-c"],
)
def test_delete_asks_at_a_terminal(scripted: "ScriptedService", answer: str, status: int, said: str) -> None:
    shown = scripted.terminal("model", "delete", "small", "--hive-id", "box1")
    shown.until("Delete small from box1? [y/N]")

    shown.type(answer)

    assert shown.end() == status
    assert said in shown.text


def test_delete_does_not_guess_where_nobody_can_be_asked(scripted: "ScriptedService") -> None:
    refused = scripted.rbee("model", "delete", "small", "--hive-id", "box1")
    done = scripted.rbee("model", "delete", "small", "--hive-id", "box1", "--yes")

    assert (refused.returncode, refused.stdout) == (2, "")
    assert "say --yes" in refused.stderr
    assert (done.returncode, done.stdout) == (0, "small is deleted; 1.84 MB are free again.\n")


def test_the_one_hive_that_has_it_need_not_be_named(scripted: "ScriptedService") -> None:
    model = "meta-llama/Llama-3.1-70B-Instruct"

    deleted = scripted.rbee("model", "delete", model, "--yes")
    unloaded = scripted.rbee("model", "unload", model)

    assert deleted.returncode == 0
    assert unloaded.stdout == f"{model} is out of device memory: w-ready is busy.\n"


def test_load_gives_the_worker_and_narrates(scripted: "ScriptedService") -> None:
    done = scripted.rbee("model", "load", "small")

    assert (done.returncode, done.stdout, done.stderr) == (0, "w-ready\n", "[queen] Waking w-ready.\n")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("hive", "drain", "box1"), "box1 takes no new work; 2 jobs still running.\n"),
        (("hive", "drain", "box1", "--undo"), "box1 takes new work; no job is running.\n"),
        (("worker", "drain", "w-ready"), "w-ready is draining; 12 running, 3 waiting.\n"),
        (("worker", "drain", "w-ready", "--undo"), "w-ready is ready; 12 running, 3 waiting.\n"),
        (("worker", "kill", "4711", "--hive-id", "box1", "--yes"), "4711 (VLLM::EngineCore) has ended.\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_was_done_is_said(scripted: "ScriptedService", command: tuple[str, ...], said: str) -> None:
    done = scripted.rbee(*command)

    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("model", "download", "../etc"), "a model id"),
        (("model", "download", "m", "--revision", "../x"), "revision"),
        (("model", "download", "m", "--source", "moon"), "moon"),
        (("worker", "logs", "w", "-n", "-1"), "-n"),
        (("worker", "kill", "1"), "PID"),
        (("worker", "show", "../x", "--hive-id", "box1"), "an id of 1 to 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_meant_is_a_usage_error(
    scripted: "ScriptedService", command: tuple[str, ...], said: str
) -> None:
    done = scripted.rbee(*command)

    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
