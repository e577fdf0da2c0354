"""The hive's settings: flags, environment and file, what refuses them, and how they are printed."""

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rbee_processes import BIN, REPOSITORY

from rbee_hive.config import CPU_KEPT_FREE_BYTES, HiveConfig, LogLimits, PortRange, load, parse
from rbee_hive.devices import DeviceChoice
from rbee_hive.settings import SETTINGS
from rbee_hive.supervisor.machine import Policy

NO_FILE = {"RBEE_CONFIG": "none"}

FULL = """
hive_id = "box1"
queen_url = "http://queen:7833"
models_dir = "/models"
model_roots = ["/shared/models", "/more"]
state_dir = "/state"
port = 7001
drain_timeout_s = 5
max_body_bytes = "2 MB"
peers = false

[labels]
zone = "a"
"example.org/rack" = "r1"

[hub]
endpoint = "http://hub:8080"
token_file = "/run/secrets/hub"

[devices]
ignore = [3, "GPU-1234"]

[devices.0]
memory_kept_free = "2 GiB"

[devices.cpu]
memory_kept_free = 4096

[workers]
startup_s = 60
stall_s = 10.5
start_limit = 5
first_port = 9400
last_port = 9410
log_bytes = "1 MiB"
log_parts = 0
"""


@pytest.fixture
def full(tmp_path: Path) -> Path:
    path = tmp_path / "hive.toml"
    path.write_text(FULL)
    return path


def refusal(argv: list[str], environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(argv, environ)

    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_defaults_come_from_the_environment() -> None:
    config = parse(["--hive-id", "box1"], {"HOME": "/home/ada", **NO_FILE})

    assert config.queen_url == "http://127.0.0.1:7833"
    assert (config.host, config.port) == ("127.0.0.1", 7835)
    assert config.models_dir == Path("/home/ada/.local/share/rbee/models")
    assert config.state_dir == Path("/home/ada/.local/state/rbee/box1")
    assert config.supervision == Policy()
    assert config.worker_ports == PortRange()
    assert config.worker_logs == LogLimits()
    assert config.device_choice == DeviceChoice()
    assert config.kept_free == {("cpu", 0): CPU_KEPT_FREE_BYTES}


def test_environment_stands_in_for_missing_flags_and_flags_win() -> None:
    environ = {
        "RBEE_QUEEN_URL": "http://queen:7833/",
        "RBEE_MODELS_DIR": "/models",
        "XDG_STATE_HOME": "/state",
        **NO_FILE,
    }

    assert parse([], environ).queen_url == "http://queen:7833"
    assert parse([], environ).models_dir == Path("/models")
    assert parse(["--queen-url", "none"], environ).queen_url is None
    assert parse(["--models-dir", "/other"], environ).models_dir == Path("/other")


def test_a_file_with_everything(full: Path) -> None:
    config = parse(["--config", str(full)], {})

    assert config.hive_id == "box1"
    assert config.model_roots == (Path("/shared/models"), Path("/more"))
    assert config.labels == {"zone": "a", "example.org/rack": "r1"}
    assert config.hub.endpoint == "http://hub:8080"
    assert config.hub.token_file == Path("/run/secrets/hub")
    assert config.device_choice == DeviceChoice(ignore=(3, "GPU-1234"))
    assert config.kept_free == {("cuda", 0): 2 << 30, ("cpu", 0): 4096}
    assert config.worker_ports == PortRange(first=9400, last=9410)
    assert config.worker_logs == LogLimits(bytes_each=1 << 20, parts=0)
    assert config.limits.max_body_bytes == 2_000_000
    assert not config.peers
    assert (config.supervision.startup_s, config.supervision.stall_s) == (60, 10.5)
    assert (config.supervision.start_limit, config.supervision.silence_s) == (5, Policy().silence_s)


def test_flag_before_environment_before_file_before_default(full: Path) -> None:
    file = {"RBEE_CONFIG": str(full)}
    both = file | {"RBEE_PORT": "7002", "RBEE_WORKERS_STALL_S": "20"}

    assert parse(["--port", "7003"], both).port == 7003
    assert parse([], both).port == 7002
    assert parse([], both).supervision.stall_s == 20
    assert parse([], file).port == 7001
    assert parse([], NO_FILE).port == 7835


def test_pairs_are_taken_from_every_source_and_the_higher_one_wins_for_each(full: Path) -> None:
    environ = {"RBEE_LABELS": "zone=b, disk=nvme", "RBEE_MEMORY_KEPT_FREE": "1=1GiB"}

    config = parse(
        ["--config", str(full), "--label", "zone=c", "--kept-free", "0=1 MiB", "--label", "empty="], environ
    )

    assert config.labels == {"zone": "c", "example.org/rack": "r1", "disk": "nvme", "empty": ""}
    assert config.kept_free == {("cuda", 0): 1 << 20, ("cuda", 1): 1 << 30, ("cpu", 0): 4096}


def test_lists_in_the_environment_and_repeated_flags() -> None:
    environ = NO_FILE | {"RBEE_DEVICES_USE": "0, GPU-1", "RBEE_MODEL_ROOTS": "/a,/b"}

    config = parse(["--ignore-device", "2", "--ignore-device", "MIG-3"], environ)

    assert config.device_choice == DeviceChoice(use=(0, "GPU-1"), ignore=(2, "MIG-3"))
    assert config.model_roots == (Path("/a"), Path("/b"))


def test_the_hubs_own_variable_stands_in_for_ours() -> None:
    environ = NO_FILE | {"HF_ENDPOINT": "http://mirror"}

    assert parse([], environ).hub.endpoint == "http://mirror"
    assert parse([], environ | {"RBEE_HUB_ENDPOINT": "http://ours"}).hub.endpoint == "http://ours"


def test_an_empty_variable_is_none() -> None:
    assert parse([], NO_FILE | {"RBEE_PORT": "", "RBEE_LABELS": ""}).port == 7835


def test_the_users_file_is_found_before_the_systems(tmp_path: Path) -> None:
    own, system = tmp_path / "config/rbee/hive.toml", tmp_path / "system.toml"
    environ = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    system.write_text("port = 1")

    assert load([], environ, system_file=system).config.port == 1
    own.parent.mkdir(parents=True)
    own.write_text("port = 2")
    assert load([], environ, system_file=system).config.port == 2
    assert load(["--config", "none"], environ, system_file=system).config.port == 7835


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--hive-id", "../x"], "--hive-id ../x is not allowed: 1 to 64 letters, digits, '.', '_' and '-'."),
        (["--hive-id", "a b"], "--hive-id a b is not allowed: 1 to 64 letters, digits, '.', '_' and '-'."),
        (["--hive-id", ""], "--hive-id  is not allowed: 1 to 64 letters, digits, '.', '_' and '-'."),
        (
            ["--queen-url", "queen:7833"],
            "--queen-url queen:7833 is not allowed: http://HOST:PORT, or none for a hive on its own.",
        ),
        (
            ["--queen-url", "http://queen:7833/path"],
            "--queen-url http://queen:7833/path is not allowed: http://HOST:PORT, or none for a hive on its "
            "own.",
        ),
        (
            ["--queen-url", "http://queen:99999"],
            "--queen-url http://queen:99999 is not allowed: http://HOST:PORT, or none for a hive on its own.",
        ),
        (
            ["--queen-url", "http://[::1"],
            "--queen-url http://[::1 is not allowed: http://HOST:PORT, or none for a hive on its own.",
        ),
        (
            ["--hub-endpoint", "http://hub:x"],
            "--hub-endpoint http://hub:x is not allowed: an http:// or https:// URL.",
        ),
        (["--port", "-1"], "--port -1 is not allowed: a port from 0 to 65535."),
        (["--port", "x"], "--port x is not allowed: a port from 0 to 65535."),
        (["--worker-stall-s", "0"], "--worker-stall-s 0 is not allowed: a number of seconds above 0."),
        (["--worker-stall-s", "nan"], "--worker-stall-s nan is not allowed: a number of seconds above 0."),
        (["--worker-engine", "magic"], "--worker-engine magic is not allowed: vllm or sim."),
        (
            ["--worker-first-port", "9500", "--worker-last-port", "9400"],
            "workers.first_port 9500 is above workers.last_port 9400.",
        ),
        (
            ["--max-body-bytes", "lots"],
            "--max-body-bytes lots is not allowed: a number of bytes, or a size as '2 GiB'.",
        ),
        (["--label", "zone"], "--label zone is not allowed: KEY=VALUE."),
        (
            ["--label", "z one=a"],
            "--label z one=a is not allowed: at most 63 letters, digits, '.', '_', '/', '-' (and spaces in a "
            "value).",
        ),
        (
            ["--kept-free", "gpu0=1GiB"],
            "--kept-free gpu0=1GiB is not allowed: a number of bytes, or a size as '2 GiB', for 'cpu' or a "
            "GPU's index.",
        ),
        (["--prot", "1"], "there is no flag --prot. Did you mean --port?"),
        (["serve"], "there is no command serve. Did you mean config?"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached by others, which needs a token: "),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else None,
)
def test_a_flag_that_cannot_be_used_is_one_line_and_exit_2(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = refusal(argv, NO_FILE, capsys)

    assert printed.startswith(f"rbee-hive: error: {line}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"RBEE_PORT": "99999"}, "RBEE_PORT=99999 is not allowed: a port from 0 to 65535."),
        ({"RBEE_LABELS": "zone"}, "RBEE_LABELS=zone is not allowed: KEY=VALUE."),
        ({"RBEE_PEERS": "perhaps"}, "RBEE_PEERS=perhaps is not allowed: true or false."),
        (
            {"HF_ENDPOINT": "ftp://hub"},
            "HF_ENDPOINT=ftp://hub is not allowed: an http:// or https:// URL.",
        ),
    ],
    ids=["port", "label", "bool", "the-hubs-own"],
)
def test_a_variable_that_cannot_be_used(
    environ: dict[str, str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal([], NO_FILE | environ, capsys) == f"rbee-hive: error: {line}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("port = 'x'", 'port = "x" is not allowed: a port from 0 to 65535.'),
        ("port = '7835'", 'port = "7835" is not allowed: a port from 0 to 65535.'),
        ("prot = 1", "there is no setting prot. Did you mean port?"),
        ("[worker]\nstall_s = 1", "there is no setting worker. Did you mean workers?"),
        ("[workers]\nstal_s = 1", "there is no setting workers.stal_s. Did you mean workers.stall_s?"),
        ("stall_s = 1", "there is no setting stall_s. Did you mean workers.stall_s?"),
        ("token = 'secret'", "there is no setting token."),
        ("[workers]\nstall_s = 0", "workers.stall_s = 0 is not allowed: a number of seconds above 0."),
        ("[workers]\nstall_s = true", "workers.stall_s = true is not allowed: a number of seconds above 0."),
        ("[workers]\nstall_s = nan", "workers.stall_s = NaN is not allowed: a number of seconds above 0."),
        ("workers = 3", "workers = 3 is not allowed: a table, [workers]."),
        ("labels = []", "labels = [] is not allowed: a table, [labels]."),
        ("model_roots = '/a'", 'model_roots = "/a" is not allowed: a list of folders.'),
        ("[devices]\nuse = [true]", "devices.use = [true] is not allowed: a list of GPU indexes or uuids."),
        (
            "[devices.0]\nmemory_kept_free = '2 G'",
            'memory_kept_free.0 = "2 G" is not allowed: a number of bytes, or a size as \'2 GiB\', for '
            "'cpu' or a GPU's index.",
        ),
        ("[devices.gpu0]\nmemory_kept_free = 1", "[devices.gpu0] is not allowed: "),
        ("[devices.0]\nkept_free = 1", "there is no setting devices.0.kept_free. Did you mean "),
        ("[labels]\nzone = 3", "labels.zone = 3 is not allowed: at most 63 letters"),
        ("port = 1979-05-27", "port = 1979-05-27 is not allowed: a port from 0 to 65535."),
    ],
    ids=[
        "type", "number-as-text", "near-name", "near-table", "near-key", "in-the-wrong-table", "secret",
        "bound", "bool", "nan", "no-table", "list-for-table", "no-list", "bool-in-list", "size", "device",
        "device-key", "label", "date",
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_names_file_key_value_and_what_is_allowed(
    tmp_path: Path, text: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hive.toml"
    path.write_text(text)

    printed = refusal([], {"RBEE_CONFIG": str(path)}, capsys)

    assert printed.startswith(f"rbee-hive: error: {path}: {line}")
    assert printed.count("\n") == 1


def test_a_file_that_is_no_toml_and_one_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hive.toml"

    printed = refusal(["--config", str(path)], {}, capsys)
    assert printed == f"rbee-hive: error: {path} cannot be read: No such file or directory.\n"

    path.write_text("port = ")
    printed = refusal(["--config", str(path)], {}, capsys)
    assert printed.startswith(f"rbee-hive: error: {path} is no TOML: ")
    assert printed.count("\n") == 1


def test_what_is_printed_is_a_file_with_the_same_meaning(full: Path, tmp_path: Path) -> None:
    loaded = load(["config", "--config", str(full), "--port", "7"], {"RBEE_LOG_LEVEL": "debug"})
    copy = tmp_path / "copy.toml"
    copy.write_text(loaded.text)

    assert loaded.is_shown
    assert load(["--config", str(copy)], {}).config == loaded.config
    lines = loaded.text.splitlines()
    assert "port = 7  # flag --port" in lines
    assert 'log_level = "debug"  # environment RBEE_LOG_LEVEL' in lines
    assert f'hive_id = "box1"  # file {full}' in lines
    assert f'"example.org/rack" = "r1"  # file {full}' in lines
    assert 'host = "127.0.0.1"  # default' in lines


def test_no_secret_is_printed(tmp_path: Path) -> None:
    environ = NO_FILE | {"RBEE_TOKEN": "a-token-of-the-cluster", "HF_TOKEN": "hf_secret"}

    text = load(["config", "--queen-url", "http://user:password@queen:1"], environ).text

    assert "# token: set (hidden)" in text
    assert 'queen_url = "http://…@queen:1"  # flag --queen-url' in text
    for secret in ("a-token-of-the-cluster", "hf_secret", "password"):
        assert secret not in text


def test_every_setting_has_a_flag_a_variable_and_words() -> None:
    assert len({setting.flag for setting in SETTINGS}) == len(SETTINGS)
    assert len({setting.variable for setting in SETTINGS}) == len(SETTINGS)
    assert all(setting.help and setting.allowed for setting in SETTINGS)
    workers = {name.removeprefix("workers.") for name in (s.name for s in SETTINGS) if "workers." in name}
    assert {name for name in Policy.__struct_fields__ if name in workers} >= {"startup_s", "stall_s"}


def test_every_setting_is_in_the_documentation_with_its_flag() -> None:
    page = (REPOSITORY / "docs/operations/hive.md").read_text()

    missing = [s.name for s in SETTINGS if f"| `{s.name}` | `{s.flag}` |" not in page]

    assert missing == []


def test_the_settings_defaults_are_those_of_the_code() -> None:
    config = parse(["--hive-id", "x"], NO_FILE)
    plain: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("hive_id", "host", "port", "queen_url", "models_dir", "state_dir", "drain_timeout_s",
                     "log_level", "worker_engine", "kept_free")
    }  # fmt: skip

    assert config == HiveConfig(**plain)


def run(*args: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "rbee-hive", *args],
        capture_output=True,
        text=True,
        timeout=50,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"} | (environ or {}),
        check=False,
    )


def test_the_program_prints_its_settings_and_ends_with_0(full: Path) -> None:
    done = run("config", "--config", str(full))

    assert (done.returncode, done.stderr) == (0, "")
    assert tomllib.loads(done.stdout)["workers"]["stall_s"] == 10.5


def test_the_program_refuses_a_wrong_file_with_one_line_and_2(tmp_path: Path) -> None:
    path = tmp_path / "hive.toml"
    path.write_text("[workers]\nfirst_prot = 9300\n")

    done = run(environ={"RBEE_CONFIG": str(path)})

    assert done.returncode == 2
    assert done.stderr == (
        f"rbee-hive: error: {path}: there is no setting workers.first_prot. "
        "Did you mean workers.first_port?\n"
    )
    assert done.stdout == ""
