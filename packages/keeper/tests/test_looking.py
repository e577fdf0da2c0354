"""The commands that look, against a service that has everything to show, also what is hostile."""

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from rbee_contracts import nodes
from rbee_contracts.events import decode_event

if TYPE_CHECKING:
    from packages.keeper.tests.conftest import ScriptedService

pytestmark = pytest.mark.timeout(180)
"""The first test of a run starts the services too."""

STEERING = ("\x1b]", "\x1b[2J", "\x9b", "\x07", "\u202e")
"""What a hostile name in the scripted service would do to a terminal."""

LISTS = [
    ("hive", "list"),
    ("hive", "show", "box1"),
    ("device", "list"),
    ("worker", "list"),
    ("worker", "processes"),
    ("model", "list"),
    ("model", "show", "small", "--hive-id", "box1"),
    ("status",),
]


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("command", LISTS, ids=" ".join)
def test_tables_fit_the_terminal(scripted: "ScriptedService", command: tuple[str, ...], columns: int) -> None:
    shown = scripted.terminal(*command, columns=columns)

    assert shown.end() == 0
    tables = [line for line in shown.text.splitlines() if not line.startswith(("Too narrow", "Not asked"))]
    drawn = [line for line in tables if "box" not in line or "degraded:" not in line]
    assert max(map(len, drawn)) <= columns
    assert ("Too narrow to show" in shown.text) <= (columns == 80)
    for steering in STEERING:
        assert steering not in shown.raw


@pytest.mark.parametrize(
    "command",
    [
        *LISTS,
        ("worker", "show", "w-failed"),
        ("worker", "logs", "w-ready", "-n", "3"),
        ("hive", "check", "box1"),
        ("status", "--json"),
        ("worker", "processes", "--json"),
        ("model", "download", "org/quick"),
    ],
    ids=" ".join,
)
def test_hostile_text_does_not_steer_a_terminal(
    scripted: "ScriptedService", command: tuple[str, ...]
) -> None:
    shown = scripted.terminal(*command, columns=200)

    assert shown.end() in (0, 1)
    for steering in STEERING[:4]:
        assert steering not in shown.raw


def test_a_name_with_a_line_break_is_one_row_in_a_pipe(scripted: "ScriptedService") -> None:
    done = scripted.rbee("worker", "processes")

    assert done.returncode == 0
    header, ours, foreign = done.stdout.splitlines()
    assert header.split() == [
        *("PID", "KIND", "NAME", "WORKER", "HIVE", "PARENT", "USER", "MEMORY", "DEVICES", "STARTED"),
    ]
    assert ours.split()[:5] == ["4711", "engine", "VLLM::EngineCore", "w-ready", "box1"]
    assert foreign.split()[:2] == ["666", "foreign"]


def test_devices_show_used_reserved_and_total(scripted: "ScriptedService") -> None:
    shown = scripted.terminal("device", "list", columns=200)

    assert shown.end() == 0
    assert "████▒▒▒▒░░░░░░░░  35.0 GiB  70.0 GiB  140.0 GiB" in shown.text
    assert "cuda:0 of box1 is degraded: Xid 63" in shown.text
    assert "process 666 (no worker of this hive) uses 1.0 GiB" in shown.text
    assert "cuda:1 of box1 is a MIG slice of GPU-0." in shown.text
    assert "Not asked, because they do not answer: box3 (lost)." in shown.text


def test_a_terminal_without_unicode_gets_other_characters(scripted: "ScriptedService") -> None:
    shown = scripted.terminal("device", "list", columns=200, PYTHONIOENCODING="ascii")

    assert shown.end() == 0
    assert "####====........" in shown.text
    assert "71 C" in shown.text
    assert shown.text.isascii()


def test_no_color_is_honoured(scripted: "ScriptedService") -> None:
    coloured = scripted.terminal("worker", "list")
    plain = scripted.terminal("worker", "list", NO_COLOR="1")

    assert (coloured.end(), plain.end()) == (0, 0)
    assert "\x1b[31m" in coloured.raw
    assert "\x1b[3" not in plain.raw


def test_worker_show_tells_why_it_failed(scripted: "ScriptedService") -> None:
    done = scripted.rbee("worker", "show", "w-failed")

    assert done.returncode == 0
    facts, _, tail = done.stdout.partition("\n\n")
    told = {line[:10].strip(): line[10:].strip() for line in facts.splitlines()}
    assert told["state"] == "failed"
    assert told["cause"] == "The engine could not load org/broken: no file named config.json."
    assert told["ended by"] == "SIGKILL"
    assert told["restarts"] == "5"
    assert tail.startswith("The last lines of its log:\n  INFO loading\n  ERROR evil")


def test_worker_show_compares_the_estimate_with_reality(scripted: "ScriptedService") -> None:
    done = scripted.rbee("worker", "show", "w-ready")

    assert "34.0 GiB used, 2.0 GiB more than estimated (+6%)" in done.stdout
    assert "32.0 GiB (weights 30.0 GiB, KV cache 1.0 GiB, engine 1.0 GiB)" in done.stdout
    assert "reserved     70.0 GiB" in done.stdout


def test_a_lost_hive_is_forgotten_by_name_and_any_other_is_refused(scripted: "ScriptedService") -> None:
    done = scripted.rbee("hive", "forget", "box3")
    assert done.stdout == "box3 at http://10.0.0.9:7835 is forgotten; it was not heard for 2h 1m or more.\n"
    assert msgspec.convert(scripted.json("hive", "forget", "box3"), nodes.HiveInfo).hive_id == "box3"

    refused = scripted.rbee("hive", "forget", "box1")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "Hive box1 is online, not lost." in refused.stderr


def test_documents_are_the_contracts_shapes(scripted: "ScriptedService") -> None:
    worker = msgspec.convert(scripted.json("worker", "show", "w-ready"), nodes.WorkerInfo)
    hive = msgspec.convert(scripted.json("hive", "show", "box1"), nodes.HiveInfo)
    drained = msgspec.convert(scripted.json("hive", "drain", "box1"), nodes.HiveDrained)
    check = msgspec.convert(scripted.json("hive", "check", "box1"), nodes.CheckResult)
    listed: Any = scripted.json("worker", "processes")
    processes = [
        msgspec.convert(each, nodes.WorkerProcessInfo, str_keys=True) for each in listed["processes"]
    ]
    [model] = msgspec.convert(
        scripted.json("model", "show", "small", "--hive-id", "box2")["models"], list[Any]
    )

    assert worker.worker_id == "w-ready"
    assert hive.labels == {"rack": "3", "fast": ""}
    assert drained.draining
    assert [finding.status for finding in check.findings] == ["ok", "warning", "failed"]
    assert [process.kind for process in processes] == ["engine", "foreign"]
    assert model["hive_id"] == "box2"


def test_check_shows_findings_with_what_to_do_and_fails(scripted: "ScriptedService") -> None:
    done = scripted.rbee("hive", "check", "box1")

    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "ok       disk: 1 TB of 2 TB are free."
    assert lines[1] == "warning  gpu cuda:0: A row of memory was remapped."
    assert lines[2] == "         What to do: Reset the GPU when it is idle: nvidia-smi --gpu-reset -i 0"
    assert lines[3].startswith("failed   hub: No answer: evil")
    assert lines[-1] == "1 ok, 1 warning, 1 failed."


def test_a_check_without_a_failure_succeeds(scripted: "ScriptedService") -> None:
    done = scripted.rbee("hive", "check", "box2")

    assert (done.returncode, done.stdout) == (
        0,
        "ok       disk: 1 TB of 2 TB are free.\n\n1 ok, 0 warnings, 0 failed.\n",
    )


def test_the_queen_checks_itself(scripted: "ScriptedService") -> None:
    done = scripted.rbee("queen", "check")

    assert done.returncode == 0
    assert done.stdout.endswith("1 ok, 0 warnings, 0 failed.\n")


def test_logs_are_lines_on_stdout(scripted: "ScriptedService") -> None:
    done = scripted.rbee("worker", "logs", "w-ready", "-n", "3")
    events = scripted.rbee("worker", "logs", "w-ready", "-n", "1", "--json")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("line 0\nline 1 evil")
    assert done.stdout.endswith("\nline 2\n")
    assert [decode_event(line).action for line in events.stdout.splitlines()] == [
        *("execute", "worker_log", "execute_complete"),
    ]


def test_followed_logs_go_on_until_ctrl_c(scripted: "ScriptedService") -> None:
    shown = scripted.terminal("worker", "logs", "w-ready", "-f", "-n", "1")
    shown.until("line 0")

    shown.type("\x03")

    assert shown.end() == 130


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("hive", "check"), "There are 3 hives: box1, box2, box3. Name one, e.g.: rbee hive check HIVE_ID"),
        (("hive", "show", "nobody"), "No hive 'nobody'."),
        (("hive", "check", "box3"), "Hive 'box3' does not answer."),
        (("worker", "show", "nobody"), "No worker 'nobody'. Workers: w-ready, w-failed. Not asked"),
        (("worker", "logs", "nobody"), "No worker 'nobody'."),
        (("worker", "kill", "666", "--hive-id", "box1", "--yes"), "Process 666 is not this hive's."),
        (("worker", "kill", "4711", "--yes"), "rbee worker kill 4711 --hive-id NAME"),
        (("model", "show", "nothing"), "Fetch it: rbee model download nothing"),
        (("model", "delete", "small", "--yes"), "The hives box1, box2 each have model 'small'."),
        (("model", "unload", "nothing"), "Loaded: meta-llama/Llama-3.1-70B-Instruct, org/broken."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_fails_with_the_remedy(
    scripted: "ScriptedService", command: tuple[str, ...], said: str
) -> None:
    done = scripted.rbee(*command)

    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
