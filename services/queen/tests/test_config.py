"""The queen's command line."""

import pytest

from rbee_queen.config import parse


def test_defaults() -> None:
    config = parse([], {})

    assert (config.host, config.port, config.drain_timeout_s, config.log_level) == (
        "127.0.0.1",
        7833,
        30.0,
        "info",
    )


def test_every_option() -> None:
    config = parse(["--host", "::1", "--port", "0", "--drain-timeout-s", "2.5", "--log-level", "debug"], {})

    assert (config.host, config.port, config.drain_timeout_s, config.log_level) == ("::1", 0, 2.5, "debug")


@pytest.mark.parametrize(
    "argv", [["--port", "70000"], ["--port", "x"], ["--log-level", "loud"], ["--nonsense"]]
)
def test_what_cannot_be_used_is_one_clear_line_and_exit_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(argv, {})

    assert exit_.value.code == 2
    assert "rbee-queen: error:" in capsys.readouterr().err
