"""What is decided without a cluster: whom to ask, what is printed, what is said about errors."""

import io
import subprocess
import sys

import pytest

from rbee_contracts.errors import RbeeError
from rbee_contracts.jobs import JobRecord
from rbee_contracts.nodes import Device, WorkerInfo
from rbee_job_client import Unreachable
from rbee_keeper import render, units
from rbee_keeper.grid import Grid
from rbee_keeper.output import Output
from rbee_keeper.remedies import explain
from rbee_keeper.settings import Options, resolve
from rbee_keeper.text import printable

JOB = "job-00000000-0000-4000-8000-000000000000"


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("options", "environ", "expected"),
    [
        (Options(), {}, ("http://127.0.0.1:7833", False)),
        (Options(), {"RBEE_QUEEN_URL": "http://q:1/"}, ("http://q:1", False)),
        (Options(queen="q:2"), {"RBEE_QUEEN_URL": "http://q:1"}, ("http://q:2", False)),
        (Options(hive="http://[::1]:7835"), {"RBEE_QUEEN_URL": "http://q:1"}, ("http://[::1]:7835", True)),
    ],
)
def test_whom_to_ask(options: Options, environ: dict[str, str], expected: tuple[str, bool]) -> None:
    settings = resolve(options, environ)

    assert expected == (settings.url, settings.is_hive)


def test_options_after_the_command_win() -> None:
    merged = Options(queen="late").over(Options(queen="early", json=True))

    assert Options(queen="late", json=True) == merged


@pytest.mark.parametrize("url", ["http://user:secret@q:1", "http://q:1/path", "ftp://q", "http://", "q q"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        resolve(Options(queen=url), {})


def test_control_characters_do_not_reach_a_terminal() -> None:
    terminal, pipe = Terminal(), io.StringIO()

    for stream in (terminal, pipe):
        Output(json=False, stdout=stream, stderr=io.StringIO()).text("a\x1b[2Jb\x9b\tc\n")

    assert terminal.getvalue() == "a[2Jb\tc\n"
    assert pipe.getvalue() == "a\x1b[2Jb\x9b\tc\n"


def test_narration_at_a_terminal_begins_a_new_line() -> None:
    stdout, stderr = Terminal(), Terminal()
    out = Output(json=False, stdout=stdout, stderr=stderr)

    out.text("half a line")
    out.say("told")
    out.end_text()

    assert stdout.getvalue() == "half a line\n"
    assert stderr.getvalue() == "told\n"


def test_a_pipe_gets_aligned_columns() -> None:
    stdout = io.StringIO()

    Output(json=False, stdout=stdout, stderr=io.StringIO()).grid(
        Grid(title="T", columns=("a", "long name"), rows=[("first", "x"), ("2", "y")], empty="none")
    )

    assert stdout.getvalue() == "A      LONG NAME\nfirst  x\n2      y\n"


def test_an_empty_table_says_what_to_do() -> None:
    stdout = io.StringIO()

    Output(json=False, stdout=stdout, stderr=io.StringIO()).grid(render.workers([]))

    assert stdout.getvalue() == "No workers. Start one: rbee worker spawn --model MODEL\n"


def test_a_document_is_one_line_in_a_pipe_and_indented_for_a_person() -> None:
    pipe, terminal = io.StringIO(), Terminal()

    for stream in (pipe, terminal):
        Output(json=True, stdout=stream, stderr=io.StringIO()).document({"a": ["ü"]})

    assert pipe.getvalue() == '{"a":["ü"]}\n'
    assert terminal.getvalue() == '{\n  "a": [\n    "ü"\n  ]\n}\n'


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0s"), (9.96, "10.0s"), (59.6, "60s"), (61, "1m 1s"), (7260, "2h 1m"), (90_000, "1d 1h")],
)
def test_durations(seconds: float, expected: str) -> None:
    assert expected == units.duration(seconds)


@pytest.mark.parametrize(("count", "expected"), [(0, "0 B"), (1_841_368, "1.84 MB"), (15e9, "15 GB")])
def test_sizes(count: float, expected: str) -> None:
    assert expected == units.size(count)


def test_a_failed_worker_shows_its_exit_status() -> None:
    worker = WorkerInfo(
        worker_id="w",
        model="m",
        state="failed",
        pid=7,
        port=9300,
        running=0,
        waiting=0,
        kv_cache_usage=0.256,
        worker="cuda",
        devices=[0, 1],
        started_at="",
        exit_code=-9,
    )

    [row] = render.workers([("box", worker)]).rows

    assert row == ("w", "m", "failed(-9)", "box", "cuda:0,1", "9300", "7", "0", "0", "26%", "-", "-", "-")


def test_a_device_tells_what_it_knows() -> None:
    gpu = Device(kind="cuda", index=0, name="H200", memory_total=2**37, memory_used=2**30, power=99.6)

    [row] = render.devices([("box", gpu)]).rows

    assert row == (
        *("cuda:0", "box", "H200", "█░░░░░░░░░░░░░░░", "1.0 GiB", "-", "128.0 GiB", "-", "-", "100 W"),
        *("0", "ok"),
    )


def test_a_job_without_times_has_no_duration() -> None:
    job = JobRecord(job_id=JOB, operation="infer", state="pending", correlation_id="c", created_at="odd")

    [row] = render.jobs([job]).rows

    assert row == (JOB, "infer", "-", "pending", "odd", "-", "-")


def test_errors_are_explained_with_what_to_do() -> None:
    unreachable = explain(Unreachable("No answer from http://q (ConnectError: long)."), "http://q")
    several = explain(RbeeError("There are several hives.", code="hive_id_needed"), "http://q")
    other = explain(RbeeError("Broken."), "http://q")

    assert unreachable.startswith("no answer from http://q. Start rbee on this machine with `rbee up`")
    assert several == "There are several hives. Add --hive-id NAME; see: rbee hive list"
    assert other == "Broken."


def test_printable_keeps_text() -> None:
    assert printable("äöü → 日本\n\t\r\x00\x7f") == "äöü → 日本\n\t"


def test_help_loads_no_client_and_no_drawing() -> None:
    code = (
        "import sys, rbee_keeper.app as app; app.build_app()\n"
        "print([name for name in ('asyncio', 'httpx', 'aiohttp', 'rich', 'ssl') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
