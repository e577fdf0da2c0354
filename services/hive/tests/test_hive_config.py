"""The hive's command line and environment."""

from pathlib import Path

import pytest

from rbee_hive.config import parse


def test_defaults_come_from_the_environment() -> None:
    config = parse(["--hive-id", "box1"], {"HOME": "/home/ada"})

    assert config.queen_url == "http://127.0.0.1:7833"
    assert (config.host, config.port) == ("127.0.0.1", 7835)
    assert config.models_dir == Path("/home/ada/.local/share/rbee/models")
    assert config.state_dir == Path("/home/ada/.local/state/rbee/box1")


def test_environment_stands_in_for_missing_flags_and_flags_win() -> None:
    environ = {
        "RBEE_QUEEN_URL": "http://queen:7833/",
        "RBEE_MODELS_DIR": "/models",
        "XDG_STATE_HOME": "/state",
    }

    assert parse([], environ).queen_url == "http://queen:7833"
    assert parse([], environ).models_dir == Path("/models")
    assert parse(["--queen-url", "none"], environ).queen_url is None
    assert parse(["--models-dir", "/other"], environ).models_dir == Path("/other")


@pytest.mark.parametrize(
    "argv",
    [
        ["--hive-id", "../x"],
        ["--hive-id", "a b"],
        ["--hive-id", ""],
        ["--queen-url", "queen:7833"],
        ["--queen-url", "http://queen:7833/path"],
        ["--port", "-1"],
    ],
)
def test_what_cannot_be_used_is_one_clear_line_and_exit_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(argv, {})

    assert exit_.value.code == 2
    assert "rbee-hive: error:" in capsys.readouterr().err
