"""`rbee logs`: lines that a person reads, and what is refused."""

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from packages.keeper.tests.conftest import ScriptedService

pytestmark = pytest.mark.timeout(180)
"""The first test of a run starts the services too."""


def test_lines_tell_when_who_what_and_with_what(scripted: "ScriptedService") -> None:
    done = scripted.rbee("logs", "--correlation-id", "corr-1")
    first, second, third = done.stdout.splitlines()[:3]
    begin = "03:04:05.678  queen           job_accepted  job_id=job-1"

    assert done.returncode == 0
    assert first.startswith(f'{begin} details="two words evil')
    assert "code=" not in first
    assert "\x1b" not in first
    assert second == "03:04:05.700  worker/w-ready  ERROR job_failed  hive_id=box1 count=3"
    assert third == "              hive/box1       poll 0"
    assert done.stderr.splitlines() == [
        "Hive box2 could not be asked: It has been silent for 7 s.",
        "queen has its own lines since 03:00.",
    ]


def test_as_json_it_is_the_result(scripted: "ScriptedService") -> None:
    done = scripted.rbee("logs", "-c", "corr-1", "--json")
    result = json.loads(done.stdout)

    assert result["correlation_id"] == "corr-1"
    assert result["lines"][0]["facts"]["details"].startswith("two words evil\x1b")
    assert list(result["silent"]) == ["box2"]


def test_no_line_is_an_error_that_says_what_is_kept(scripted: "ScriptedService") -> None:
    done = scripted.rbee("logs", "-c", "quiet")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "Error: No service has a line of 'quiet'. queen has its own lines since 03:00."
    )
    assert scripted.rbee("logs", "-c", "quiet", "--json").returncode == 0


def test_followed_each_line_is_told_once_until_ctrl_c(scripted: "ScriptedService") -> None:
    shown = scripted.terminal("logs", "-c", "corr-1", "-f")
    shown.until("poll 0")
    before = shown.raw.count("poll ")
    while shown.raw.count("poll ") < before + 2:
        shown.until(f"poll {shown.raw.count('poll ')}")

    shown.type("\x03")

    assert shown.end() == 130
    assert shown.text.count("job_accepted") == 1
    assert shown.text.count("poll 0\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name the request"),
        (("-c", "a", "--job-id", "b"), "name the request"),
        (("-c", "a b"), "correlation id"),
        (("-c", ""), "correlation id"),
        (("--job-id", "../x"), "is no job id"),
        (("-c", "a", "--since", "soon"), "is no length of time"),
        (("-c", "a", "--since", "9d"), "at most 7d"),
        (("-c", "a", "--since", "0s"), "more than 0"),
        (("-c", "a", "--hive-id", "-x"), "hive_id"),
        (("-c", "a", "--level", "loud"), "loud"),
        (("-c", "a", "--limit", "0"), "limit"),
    ],
    ids=["none", "both", "hostile", "empty", "path", "since", "long ago", "now", "hive", "level", "limit"],
)
def test_what_cannot_be_meant_is_refused(
    scripted: "ScriptedService", arguments: tuple[str, ...], words: str
) -> None:
    done = scripted.rbee("logs", *arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


@pytest.mark.parametrize("since", ["90", "90s", "1.5m", "2h", "7d"])
def test_lengths_of_time(scripted: "ScriptedService", since: str) -> None:
    assert scripted.rbee("logs", "-c", "corr-1", "--since", since, "--level", "warning").returncode == 0
