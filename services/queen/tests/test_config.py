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


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        ([], {}, None),
        ([], {"RBEE_OTLP_ENDPOINT": "", "OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        (["--otlp-endpoint", "http://a:4318"], {"RBEE_OTLP_ENDPOINT": "http://b"}, "http://a:4318"),
        ([], {"RBEE_OTLP_ENDPOINT": "http://b", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, "http://b"),
        ([], {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://c/otlp"}, "https://c/otlp"),
    ],
    ids=["nothing", "empty", "flag", "variable", "standard"],
)
def test_where_traces_go(argv: list[str], environ: dict[str, str], expected: str | None) -> None:
    assert parse(argv, environ).otlp_endpoint == expected


@pytest.mark.parametrize(
    "url", ["collector:4318", "ftp://x", "http://user:SECRET@x", "http://", "http://x?a"]
)
def test_a_collector_that_is_no_url_is_refused_without_telling_it(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse([], {"RBEE_OTLP_ENDPOINT": url})

    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("rbee-queen: error: RBEE_OTLP_ENDPOINT must be an http:// or https:// URL")
    assert "SECRET" not in told
    assert told.count("\n") == 1


def test_how_long_a_hive_may_be_silent() -> None:
    config = parse(["--hive-unreachable-after-s", "3", "--hive-lost-after-s", "9.5"], {})

    assert (config.patience.unreachable_after_s, config.patience.lost_after_s) == (3.0, 9.5)
    assert (parse([], {}).patience.unreachable_after_s, parse([], {}).patience.lost_after_s) == (5.0, 30.0)


@pytest.mark.parametrize(
    "argv",
    [
        ["--hive-unreachable-after-s", "1"],
        ["--hive-unreachable-after-s", "30"],
        ["--hive-lost-after-s", "5"],
        ["--hive-lost-after-s", "inf"],
        ["--hive-unreachable-after-s", "nan"],
    ],
)
def test_a_patience_that_cannot_be_meant_is_refused(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(argv, {})

    assert exit_.value.code == 2
    assert "less than --hive-lost-after-s" in capsys.readouterr().err
