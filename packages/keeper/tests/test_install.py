"""`rbee install` and `rbee uninstall` below a folder: what is there afterwards, what is told and refused."""

import errno
import grp
import json
import os
import pwd
import re
import socket
import stat
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest

from rbee_contracts.errors import RbeeError
from rbee_keeper.install import checks
from rbee_keeper.install.machine import Change, Machine
from rbee_keeper.install.steps import PACKAGED_PREFIX, UNITS, File, Folder, unit_text

if TYPE_CHECKING:
    from packages.keeper.tests.conftest import Sandbox

pytestmark = pytest.mark.timeout(180)
"""Some run the command seven times, each of which loads it anew."""

REPOSITORY = Path(__file__).resolve().parents[3]
TOKEN = "a-token-of-a-test-cluster"
Install: TypeAlias = "Callable[..., subprocess.CompletedProcess[str]]"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with rbee's programs in it, and nothing installed."""
    programs = tmp_path / "root/opt/rbee/bin"
    programs.mkdir(parents=True)
    for name in ("rbee-queen", "rbee-hive"):
        (programs / name).touch()
    return tmp_path / "root"


@pytest.fixture
def install(sandbox: "Sandbox", root: Path) -> Install:
    """`install("queen", …)` and `install("uninstall", "hive", …)` below that folder."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = words if words[0] == "uninstall" else ("install", *words, "--prefix", "/opt/rbee")
        return sandbox.run("rbee", *command, "--root", str(root))

    return run


def tree(root: Path) -> set[str]:
    """Give every file below a folder but the programs."""
    found = {
        f"/{path.relative_to(root)}" for path in root.rglob("*") if not path.is_dir() or path.is_symlink()
    }
    return {path for path in found if not path.startswith("/opt/")}


def contents(root: Path) -> dict[str, bytes]:
    return {path: (root / path[1:]).read_bytes() for path in tree(root) if not (root / path[1:]).is_symlink()}


QUEEN = {
    "/etc/rbee/queen.env",
    "/etc/systemd/system/rbee-queen.service",
    "/etc/systemd/system/multi-user.target.wants/rbee-queen.service",
}
HIVE = {
    "/etc/rbee/hive.toml",
    "/etc/systemd/system/rbee-hive.service",
    "/etc/systemd/system/rbee-hive-workers.service",
    "/etc/systemd/system/multi-user.target.wants/rbee-hive.service",
}
COMMON = {"/etc/rbee/token", "/etc/sysusers.d/rbee.conf", "/etc/tmpfiles.d/rbee.conf"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_queen_gets_a_token_and_her_hive_on_the_same_machine_takes_it(install: Install, root: Path) -> None:
    queen = install("queen")
    assert queen.returncode == 0, queen.stderr
    token = (root / "etc/rbee/token").read_text()
    hive = install("hive", "--hive-id", "box1")

    assert hive.returncode == 0, hive.stderr
    assert tree(root) == COMMON | QUEEN | HIVE
    assert re.fullmatch(r"[0-9a-f]{64}\n", token)
    assert (root / "etc/rbee/token").read_text() == token
    assert token.strip() not in queen.stdout + queen.stderr + hive.stdout
    assert "rbee install hive --queen http://ADDRESS:7833 --token-file FILE" in queen.stdout
    assert mode(root / "etc/rbee") == 0o750
    assert mode(root / "etc/rbee/token") == 0o600
    assert mode(root / "etc/rbee/hive.toml") == 0o640
    settings = tomllib.loads((root / "etc/rbee/hive.toml").read_text())
    assert (settings["hive_id"], settings["queen_url"]) == ("box1", "http://127.0.0.1:7833")
    options = (root / "etc/rbee/queen.env").read_text().splitlines()[-1]
    assert options == "RBEE_QUEEN_OPTIONS=--host 0.0.0.0 --port 7833 --token-file /etc/rbee/token"
    link = root / "etc/systemd/system/multi-user.target.wants/rbee-hive.service"
    assert os.readlink(link) == "/etc/systemd/system/rbee-hive.service"


def test_the_settings_that_are_written_are_some_that_a_hive_takes(
    install: Install, root: Path, sandbox: "Sandbox", tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    arguments = ("--queen", "http://10.0.0.5:7833", "--token-file", str(token), "--models-dir", "/srv/models")
    installed = install("hive", *arguments)
    assert installed.returncode == 0, installed.stderr
    file = root / "etc/rbee/hive.toml"
    file.write_text(file.read_text().replace("/etc/rbee/token", str(root / "etc/rbee/token")))

    shown = sandbox.run("rbee-hive", "config", "--config", str(file))
    assert shown.returncode == 0, shown.stderr
    assert tomllib.loads(shown.stdout) | {
        "queen_url": "http://10.0.0.5:7833",
        "host": "0.0.0.0",
        "models_dir": "/srv/models",
    } == tomllib.loads(shown.stdout)
    drop_in = root / "etc/systemd/system/rbee-hive.service.d/10-rbee-models.conf"
    assert 'ReadWritePaths="/srv/models"' in drop_in.read_text()
    assert (root / "srv/models").is_dir()


def test_a_second_run_changes_nothing_and_says_so(install: Install, root: Path) -> None:
    install("queen")
    before = contents(root)
    again = install("queen")

    assert (again.returncode, again.stdout) == (0, "The queen is installed already; nothing was changed.\n")
    assert contents(root) == before


def test_edited_settings_are_kept_and_changed_units_are_told(install: Install, root: Path) -> None:
    install("queen")
    settings, unit = root / "etc/rbee/queen.env", root / "etc/systemd/system/rbee-queen.service"
    settings.write_text("RBEE_QUEEN_OPTIONS=--port 1\n")
    unit.write_text("[Service]\n")
    again = install("queen")

    assert settings.read_text() == "RBEE_QUEEN_OPTIONS=--port 1\n"
    assert unit.read_text() == unit_text("rbee-queen.service", Path("/opt/rbee"))
    assert [line.split()[0] for line in again.stdout.splitlines()] == ["kept", "changed"]
    assert f"kept     /etc/rbee/{settings.name}: it has settings of its own" in again.stdout


@pytest.mark.parametrize(
    "words", [("queen",), ("uninstall", "queen", "--purge")], ids=["install", "uninstall"]
)
def test_a_dry_run_does_nothing(install: Install, root: Path, words: tuple[str, ...]) -> None:
    if words[0] == "uninstall":
        install("queen")
    before = contents(root)
    said = install(*words, "--dry-run")

    assert said.returncode == 0, said.stderr
    assert "would be " in said.stdout
    assert contents(root) == before


def test_uninstalling_keeps_settings_and_state_and_purging_does_not(install: Install, root: Path) -> None:
    install("queen")
    install("hive")
    (root / "var/lib/rbee-hive/models").mkdir(parents=True)
    kept = install("uninstall", "hive")

    assert "--purge" in kept.stdout
    assert tree(root) == COMMON | QUEEN | {"/etc/rbee/hive.toml"}
    assert (root / "var/lib/rbee-hive").is_dir()
    purged = install("uninstall", "hive", "--purge", "--yes")
    assert purged.returncode == 0, purged.stderr
    assert tree(root) == COMMON | QUEEN
    assert not (root / "var/lib/rbee-hive").exists()
    last = install("uninstall", "queen", "--purge", "--yes")
    assert last.returncode == 0, last.stderr
    assert tree(root) == set()
    assert not (root / "etc/rbee").exists()
    assert install("uninstall", "queen").stdout == "No queen is installed here; nothing was changed.\n"


def test_what_one_role_keeps_is_not_purged_with_the_other(install: Install, root: Path) -> None:
    install("queen")
    install("hive")
    (root / "var/lib/rbee-queen").mkdir(parents=True)
    install("uninstall", "queen")
    install("uninstall", "hive", "--purge", "--yes")
    assert tree(root) == COMMON | {"/etc/rbee/queen.env"}
    assert (root / "var/lib/rbee-queen").is_dir()

    (root / "etc/rbee/notes").write_text("of the administrator")
    last = install("uninstall", "queen", "--purge", "--yes")
    assert tree(root) == {"/etc/rbee/notes"}
    assert "kept     /etc/rbee: it holds files that are not rbee's: notes" in last.stdout


def test_a_role_that_is_disabled_is_installed_all_the_same(install: Install, root: Path) -> None:
    install("queen")
    install("hive")
    (root / "etc/systemd/system/multi-user.target.wants/rbee-queen.service").unlink()
    install("uninstall", "hive", "--purge", "--yes")

    assert tree(root) == COMMON | {"/etc/rbee/queen.env", "/etc/systemd/system/rbee-queen.service"}


def test_a_token_that_was_put_there_by_hand_gets_the_mode_that_a_service_needs(
    install: Install, root: Path
) -> None:
    (root / "etc/rbee").mkdir(parents=True, mode=0o700)
    (root / "etc/rbee/token").write_text(f"{TOKEN}\n")
    (root / "etc/rbee/token").chmod(0o644)
    said = install("queen")

    assert said.returncode == 0, said.stderr
    assert "changed  /etc/rbee/token: to owner rbee:rbee and mode 0600" in said.stdout
    assert (root / "etc/rbee/token").read_text() == f"{TOKEN}\n"
    assert (mode(root / "etc/rbee"), mode(root / "etc/rbee/token")) == (0o750, 0o600)
    assert "nothing was changed" in install("queen").stdout


def test_a_closed_umask_closes_no_folder_above(install: Install, root: Path) -> None:
    install("queen")
    before = os.umask(0o077)
    try:
        said = install("hive", "--models-dir", "/srv/a/models")
    finally:
        os.umask(before)

    assert said.returncode == 0, said.stderr
    assert (mode(root / "srv/a"), mode(root / "srv/a/models")) == (0o755, 0o750)
    assert mode(root / "etc/systemd/system/rbee-hive.service") == 0o644


def test_the_hive_of_a_queens_machine_finds_her_where_her_settings_say(install: Install, root: Path) -> None:
    install("queen", "--port", "8000", "--host", "fd00::5")
    install("hive")

    settings = tomllib.loads((root / "etc/rbee/hive.toml").read_text())
    assert settings["queen_url"] == "http://[fd00::5]:8000"


def test_another_models_folder_than_the_settings_name_is_refused(install: Install, root: Path) -> None:
    install("queen")
    folder = "/srv/two words 100% \N{SNOWFLAKE} \N{GRINNING FACE}"
    assert install("hive", "--models-dir", f"{folder}/").returncode == 0
    settings = (root / "etc/rbee/hive.toml").read_text()
    assert tomllib.loads(settings)["models_dir"] == folder
    before = contents(root)
    said = install("hive", "--models-dir", "/srv/other")

    assert said.returncode == 1
    assert "/etc/rbee/hive.toml names another folder of models" in said.stderr
    assert contents(root) == before
    assert not (root / "srv/other").exists()
    assert "nothing was changed" in install("hive", "--models-dir", folder).stdout
    (root / "etc/rbee/hive.toml").write_text("port 1")
    assert "is not TOML" in install("hive", "--models-dir", folder).stderr


def test_a_hive_that_is_installed_again_after_its_removal_needs_no_options(
    install: Install, root: Path, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    install("hive", "--queen", "http://10.0.0.5:7833", "--token-file", str(token))
    install("uninstall", "hive")
    again = install("hive")

    assert again.returncode == 0, again.stderr
    assert "http://10.0.0.5:7833" in (root / "etc/rbee/hive.toml").read_text()


def test_nothing_is_done_outside_of_an_image(install: Install, root: Path, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (root / "etc").mkdir()
    (root / "etc/rbee").symlink_to(tmp_path / "host")
    said = install("queen")

    assert said.returncode == 1
    assert "/etc/rbee/token lies behind a link that leads out of" in said.stderr
    assert list((tmp_path / "host").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--hive-id", "box 1"), "'box 1' is no name of a hive"),
        (("--hive", "http://10.0.0.7:7835"), "for a hive's queen say --queen URL"),
    ],
    ids=["hive-id", "hive-url"],
)
def test_options_that_make_no_hive_are_refused(
    install: Install, root: Path, words: tuple[str, ...], why: str
) -> None:
    install("queen")
    said = install("hive", *words)

    assert said.returncode != 0
    assert why in " ".join(said.stderr.split())
    assert tree(root) == COMMON | QUEEN


def test_purging_asks_first(install: Install, root: Path) -> None:
    install("queen")
    refused = install("uninstall", "queen", "--purge")

    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert tree(root) == COMMON | QUEEN


def test_json_tells_the_changes(install: Install) -> None:
    said = json.loads(install("queen", "--json").stdout)

    assert {"what": "/etc/rbee/token", "verdict": "created", "why": ""} in said["changes"]


def test_a_hive_needs_a_queen_and_a_token(install: Install, root: Path, tmp_path: Path) -> None:
    nobody = install("hive")
    assert (nobody.returncode, tree(root)) == (1, set())
    assert "--queen http://ADDRESS:7833" in nobody.stderr
    without = install("hive", "--queen", "http://10.0.0.5:7833")
    assert (without.returncode, tree(root)) == (1, set())
    assert "Copy /etc/rbee/token from the queen's machine" in without.stderr

    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o644)
    read = install("hive", "--queen", "http://10.0.0.5:7833", "--token-file", str(token))
    assert (read.returncode, tree(root)) == (1, set())
    assert (
        f"has mode 0644, so others on this machine can read it. Close it first: chmod 600 {token}"
        in read.stderr
    )
    token.chmod(0o600)
    assert install("hive", "--queen", "http://10.0.0.5:7833", "--token-file", str(token)).returncode == 0

    token.write_text(f"another-{TOKEN}")
    differs = install("hive", "--queen", "http://10.0.0.5:7833", "--token-file", str(token))
    assert differs.returncode == 1
    assert "/etc/rbee/token holds another token than the one given" in differs.stderr
    (root / "etc/rbee/token").write_text("short\n")
    unusable = install("hive", "--queen", "http://10.0.0.5:7833")
    assert unusable.returncode == 1
    assert "the token in /etc/rbee/token is shorter than 16 characters" in unusable.stderr


def test_a_program_that_is_not_there_is_missed(install: Install, root: Path) -> None:
    (root / "opt/rbee/bin/rbee-queen").unlink()
    said = install("queen")

    assert (said.returncode, tree(root)) == (1, set())
    assert "/opt/rbee/bin/rbee-queen is not there" in said.stderr


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("models", "no absolute path"),
        ("/home/me/models", "lies below /home"),
        ("/srv/../home/me/models", "lies below /home"),
        ("/srv/a\nb", "no absolute path"),
        ("/", "no absolute path"),
        ("/var/lib/rbee-hive/mine", "goes with --purge"),
    ],
    ids=["relative", "hidden", "hidden-by-dots", "newline", "root", "state"],
)
def test_a_models_folder_that_a_hive_could_not_use_is_refused(
    install: Install, root: Path, folder: str, why: str
) -> None:
    install("queen")
    said = install("hive", "--models-dir", folder)

    assert said.returncode == 1
    assert why in said.stderr
    assert tree(root) == COMMON | QUEEN


# --- the checks of a live machine ------------------------------------------------------------------------


def refusal(check: Callable[[], object]) -> str:
    with pytest.raises(RbeeError) as refused:
        check()
    return refused.value.details


def test_it_needs_root_and_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root. Run it with sudo" in refusal(lambda: checks.check_rights("rbee install queen"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    told = refusal(lambda: checks.check_rights("rbee install queen"))
    assert "systemd does not run this machine" in told
    assert "--root DIR" in told
    monkeypatch.setattr(Path, "is_dir", lambda path: str(path) == "/run/systemd/system")
    checks.check_rights("rbee install queen")


def test_an_environment_that_services_cannot_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "HIDDEN", (str(tmp_path),))
    (tmp_path / "bin").mkdir()
    missing = refusal(lambda: checks.check_environment(tmp_path, "hive"))
    assert f"{tmp_path}/bin/rbee-hive is not there" in missing
    (tmp_path / "bin/rbee-hive").touch()
    hidden = refusal(lambda: checks.check_environment(tmp_path, "hive"))
    assert f"lies below {tmp_path}, which the units hide from their services" in hidden
    assert "PYTHON=/usr/bin/python3" in hidden


def test_what_a_link_leads_to_must_be_seen_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "HIDDEN", (str(tmp_path / "home"),))
    (tmp_path / "home/rbee/bin").mkdir(parents=True)
    (tmp_path / "home/rbee/bin/rbee-queen").touch()
    (tmp_path / "link").symlink_to(tmp_path / "home/rbee")

    told = refusal(lambda: checks.check_environment(tmp_path / "link", "queen"))
    assert f"{tmp_path}/link lies below {tmp_path}/home" in told
    told = refusal(lambda: checks.usable_models_dir(str(tmp_path / "link"), is_live=True))
    assert "which its unit hides from the hive" in told
    assert checks.usable_models_dir(str(tmp_path / "link"), is_live=False) == str(tmp_path / "link")
    assert checks.usable_models_dir("/var/lib/rbee-hive/models/", is_live=False) is None


def test_a_closed_folder_above_the_environment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "HIDDEN", ())
    prefix = tmp_path / "mine/rbee"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin/rbee-queen").touch()
    prefix.chmod(0o755)
    (tmp_path / "mine").chmod(0o700)

    told = refusal(lambda: checks.check_environment(prefix, "queen"))
    assert f"lies below {tmp_path / 'mine'}, which other users may not enter" in told


def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))  # nobody else gets it from here on, and nobody listens yet
        port = taken.getsockname()[1]
        checks.check_port("127.0.0.1", port, "hive")
        taken.listen()
        told = refusal(lambda: checks.check_port("127.0.0.1", port, "hive"))
        assert f"the hive could not listen on 127.0.0.1:{port}: Address already in use" in told


def test_two_slashes_are_the_machine_itself(sandbox: "Sandbox") -> None:
    said = sandbox.run("rbee", "uninstall", "queen", "--root", "//", "--json", "--dry-run")

    assert said.returncode == 0 or "systemctl cannot be run" in said.stderr
    assert Machine(Path("//").resolve(), is_dry=True, tell=lambda change: None).is_live


@pytest.mark.parametrize(
    "prefix",
    ["/opt/my rbee", "/opt/100%", "/opt/$HOME", '/opt/"'],
    ids=["space", "percent", "dollar", "quote"],
)
def test_an_environment_that_a_unit_cannot_name_is_refused(prefix: str) -> None:
    assert "that a unit cannot name" in refusal(lambda: checks.check_prefix(Path(prefix)))
    checks.check_prefix(Path("/opt/rbee-0.6/.venv"))


def test_a_write_that_fails_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, is_dry=False, tell=lambda change: None)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        told = refusal(lambda: machine.make(File(path="/etc/rbee/token", text=TOKEN)))
    assert told == (
        "cannot make /etc/rbee/token: No space left on device. "
        "Mend that and run it again: what is done stays done."
    )
    assert list((tmp_path / "etc/rbee").iterdir()) == []
    assert machine.make(File(path="/etc/rbee/token", text=TOKEN))


def test_a_user_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(tmp_path, is_dry=False, tell=lambda change: None)
    machine.is_live = True
    step = File(path="/token", text=TOKEN, owner="no-such-user-rbee:no-such-group-rbee")

    assert "Make them: systemd-sysusers" in refusal(lambda: machine.make(step))


def test_only_the_user_that_was_made_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[Change] = []
    machine = Machine(Path("/"), is_dry=True, tell=changes.append)
    person = pwd.struct_passwd(("rbee", "x", 1000, 1000, "Rosa Bee", "/home/rbee", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwnam", lambda name: person)
    monkeypatch.setattr(grp, "getgrnam", lambda name: grp.struct_group(("rbee", "x", 1000, [])))
    machine.remove_user()

    assert [(change.what, change.verdict) for change in changes] == [("user rbee", "kept")]


@pytest.mark.parametrize(
    ("state", "done"), [("failed", ["systemctl reset-failed rbee-hive.service"]), ("inactive", [])]
)
def test_a_failure_of_before_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, state: str, done: list[str]
) -> None:
    """systemd refuses to start what it has given up, also when its cause is mended."""
    changes: list[Change] = []
    told = subprocess.CompletedProcess[str]([], 0, f"{state}\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: told)
    Machine(Path("/"), is_dry=True, tell=changes.append).forget_failure("rbee-hive.service")

    assert [change.what for change in changes] == done


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    changes: list[Change] = []
    (tmp_path / "etc").write_text("a file")
    machine = Machine(tmp_path, is_dry=False, tell=changes.append)
    with pytest.raises(RbeeError, match="cannot make /etc/rbee: Not a directory"):
        machine.make(Folder(path="/etc/rbee", mode=0o750, owner="root:rbee"))


# --- the units --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for names in UNITS.values() for name in names])
def test_the_units_in_deploy_are_those_that_are_installed(name: str) -> None:
    deployed = REPOSITORY / "deploy/systemd" / name

    assert deployed.read_text() == unit_text(name, Path(PACKAGED_PREFIX))
    assert unit_text(name, Path("/srv/x")).count("/srv/x/bin/rbee-") == 1
    assert PACKAGED_PREFIX not in unit_text(name, Path("/srv/x"))
