"""The cause of a worker's end is found in its log, above the tracebacks that only point to it."""

import pytest

from rbee_hive.supervisor.root_cause import MAX_CHARS, is_out_of_memory, root_cause

CORE_FAILED = """
{"event":"engine_loading","model":"/models/m","level":"info"}
(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1136] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1136] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1136]   File "loader.py", line 1, in load
(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1136] ValueError: weights not initialized: {'a'}
(EngineCore pid=7) Process EngineCore:
Traceback (most recent call last):
  File "process.py", line 314, in _bootstrap
ValueError: weights not initialized: {'a'}
Traceback (most recent call last):
  File "core_client.py", line 9, in wait
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
{"event":"service_failed","cause":"cannot load: Engine core initialization failed. See root cause above."}
{"event":"stopped","exit_code":1,"level":"info"}
""".strip().splitlines()


def test_the_cause_above_the_last_traceback_is_found() -> None:
    assert root_cause(CORE_FAILED) == "ValueError: weights not initialized: {'a'}"


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([], None),
        (["all is well", "{not json", '{"event":"stopped","cause":"no"}', "[1]"], None),
        (['{"event":"service_failed","cause":"bad engine argument:  --x"}'], "bad engine argument: --x"),
        (['{"event":"engine_died","cause":"it died"}', "ValueError: noise"], "it died"),
        (
            ["huggingface_hub.errors.HFValidationError: Repo id must be …"],
            "HFValidationError: Repo id must be …",
        ),
        (["KeyboardInterrupt", "an Error: in prose"], "Error: in prose"),
        (['{"event":"service_failed","cause":"See root cause above."}'], "See root cause above."),
        (['{"event":"service_failed","cause":7}'], None),
    ],
    ids=["empty", "nothing", "own", "own first", "module", "prose", "pointer only", "no text"],
)
def test_what_is_taken_for_the_cause(lines: list[str], cause: str | None) -> None:
    assert root_cause(lines) == cause


def test_a_long_cause_is_cut() -> None:
    found = root_cause(["ValueError: " + "x" * 9999])
    assert found is not None
    assert len(found) == MAX_CHARS


@pytest.mark.parametrize(
    ("cause", "is_it"),
    [
        ("exited with status 1 (OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB)", True),
        ("exited with status 1 (ValueError: Free memory on device cuda:0 (1/80 GiB) is less than …)", True),
        ("was ended by signal 9", False),
    ],
)
def test_too_little_device_memory_is_told_apart(cause: str, is_it: bool) -> None:
    """F10."""
    assert is_out_of_memory(cause) is is_it


def test_a_line_of_json_without_an_end_is_passed_over() -> None:
    assert root_cause(["ValueError: it is this", '{"a":' + "[" * 30_000]) == "ValueError: it is this"
