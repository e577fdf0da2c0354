"""Workers' logs: their last lines, kept bounded, followed as they grow."""

import os
from pathlib import Path

import pytest

from rbee_hive.config import LogLimits
from rbee_hive.supervisor.logs import LogFolder, LogReader, rotate, size, tail


def test_the_tail_is_the_last_lines_and_survives_odd_bytes(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    path.write_bytes(b"".join(b"line %d\n\n" % i for i in range(5000)) + b"\xff end\n")

    assert len(tail(path)) == 20
    assert tail(path, 2) == ["line 4999", "\ufffd end"]
    assert tail(tmp_path / "none") == []
    assert size(tmp_path / "none") == 0


def test_the_tail_leaves_out_what_an_earlier_process_wrote(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    path.write_text("of the first\n")
    offset = size(path)
    with path.open("a") as log:
        log.write("of the second\n")

    assert tail(path, since=offset) == ["of the second"]
    assert tail(path, since=10_000) == ["of the first", "of the second"], "it was moved aside since"


def test_a_log_is_moved_aside_under_who_writes_it(tmp_path: Path) -> None:
    """A worker's file stays open: what it writes after that is in the new one, from its start."""
    limits = LogLimits(bytes_each=100, parts=2)
    path = tmp_path / "w.log"
    with path.open("ab", buffering=0) as writer:
        for part in range(4):
            writer.write(b"%d" % part * 120)
            assert rotate(path, limits)
            assert not rotate(path, limits)
        writer.write(b"after")

    assert path.read_bytes() == b"after"
    assert path.with_name("w.log.1").read_bytes() == b"3" * 120
    assert path.with_name("w.log.2").read_bytes() == b"2" * 120
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.log", "w.log.1", "w.log.2"]


@pytest.mark.parametrize("parts", [0, 1])
def test_few_parts_or_none_are_kept(tmp_path: Path, parts: int) -> None:
    path = tmp_path / "w.log"
    for _ in range(3):
        path.write_bytes(b"x" * 200)
        assert rotate(path, LogLimits(bytes_each=100, parts=parts))

    assert len(list(tmp_path.glob("w.log.*"))) == parts


def test_logs_of_workers_that_are_gone_are_deleted_oldest_first(tmp_path: Path) -> None:
    folder = LogFolder(tmp_path, LogLimits(workers=2))
    for number in range(5):
        path = folder.path(f"w{number}")
        path.write_text("x")
        os.utime(path, (number, number))
    folder.path("w0").with_name("w0.log.1").write_text("x")
    folder.path("w1").with_name("w1.log.1").write_text("x")
    folder.prune({"w0"})

    assert sorted(p.name for p in tmp_path.iterdir()) == ["w0.log", "w0.log.1", "w3.log", "w4.log"]
    assert not folder.rotate("w0")


@pytest.mark.parametrize("lines", [0, 1, 3, 100])
@pytest.mark.parametrize("block", [4, 65_536])
def test_a_reader_begins_with_the_last_lines(
    tmp_path: Path, lines: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rbee_hive.supervisor.logs.READ_BYTES", block)
    path = tmp_path / "w.log"
    path.write_text("".join(f"line {i}\n" for i in range(10)))
    reader = LogReader(path)

    assert reader.last(lines) == [f"line {i}" for i in range(10)][10 - min(lines, 10) :]
    assert reader.more() == []


def test_a_reader_goes_on_with_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    path.write_text("one\ntw")
    reader = LogReader(path)
    assert reader.last(5) == ["one"]
    with path.open("a") as log:
        log.write("o\nthree\r\nfo")
        log.flush()
        assert reader.more() == ["two", "three"]
        assert reader.more() == []
        log.write("ur\n")
    assert reader.more() == ["four"]


def test_a_reader_survives_that_the_log_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    path.write_text("an old line\n")
    reader = LogReader(path)
    reader.last(1)
    path.write_text("new\n")

    assert reader.more() == ["new"]


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    reader = LogReader(tmp_path / "none")
    assert reader.last(3) == []
    assert reader.more() == []


def test_a_log_that_cannot_be_deleted_does_not_end_the_keeping(tmp_path: Path) -> None:
    folder = LogFolder(tmp_path, LogLimits(workers=0))
    (tmp_path / "a.log").mkdir()
    (tmp_path / "b.log").write_text("x")

    folder.prune([])

    assert [path.name for path in tmp_path.iterdir()] == ["a.log"]
