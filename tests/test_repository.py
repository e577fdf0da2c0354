"""What holds for the repository as a whole: what is committed, what is pinned, who imports whom."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
LISTS = sorted((ROOT / "requirements").glob("*.txt"))
WORKSPACE = tomllib.loads((ROOT / "pyproject.toml").read_text())
MEMBERS: list[str] = WORKSPACE["tool"]["uv"]["workspace"]["members"]
SIBLINGS: dict[str, set[str]] = {
    "rbee_contracts": set(),
    "rbee_job_server": {"rbee_contracts"},
    "rbee_job_client": {"rbee_contracts"},
    "rbee_keeper": {"rbee_contracts", "rbee_job_client"},
    "rbee_queen": {"rbee_contracts", "rbee_job_client", "rbee_job_server"},
    "rbee_hive": {"rbee_contracts", "rbee_job_client", "rbee_job_server"},
    "rbee_worker": {"rbee_contracts", "rbee_job_server"},
}
# Folders that say nothing about one machine.
COMMON_FOLDERS = {
    *("/", "/app", "/data", "/etc", "/home", "/mnt", "/opt", "/src", "/srv", "/tmp"),
    *("/usr", "/usr/local", "/usr/share", "/var", "/var/lib"),
}


def output_of(*command: str) -> str:
    """Return what a command prints, or nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout


@cache
def committed() -> list[Path]:
    listing = output_of("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if not listing:
        pytest.skip("not a git checkout")
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def content(path: Path) -> bytes:
    """Give what is in a file; nothing where it is gone again, as a file that an editor makes for a moment."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


@cache
def sources() -> list[tuple[str, Path]]:
    """Every module of the members as (import name of its member, path)."""
    return [
        (package.name, path)
        for member in MEMBERS
        for package in sorted((ROOT / member / "src").iterdir())
        if package.is_dir()
        for path in sorted(package.rglob("*.py"))
    ]


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of each module that a file imports by name, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def pins(path: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", path.read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def forbidden_hosts() -> set[str]:
    # Put together here, so that this file does not hold them itself.
    hosts = {
        ".".join(parts)
        for parts in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"))
    }
    hosts.add(".".join(("download", "pytorch", "org")))
    settings = output_of("python3", "-m", "pip", "config", "list")
    settings += output_of("npm", "config", "get", "registry")
    for url in re.findall(r"https?://[^\s'\"]+", settings):
        host = urlsplit(url).hostname
        if host and host not in {"localhost", "127.0.0.1", "::1"}:
            hosts.add(host)
    return hosts


def forbidden_folders() -> set[str]:
    settings = output_of("python3", "-m", "pip", "config", "list")
    found = {ROOT, Path.home()}
    for key, value in re.findall(r"^\S*?\.([a-z-]+)='(.*)'$", settings, re.MULTILINE):
        if key in {"find-links", "index-url", "extra-index-url"}:
            found |= {Path(part.removeprefix("file://")) for part in value.split()}
    found = {path for path in found if path.is_absolute()}
    return {str(path) for path in found | {path.parent for path in found}} - COMMON_FOLDERS


def test_no_lock_file_is_committed() -> None:
    names = {path.name for path in committed()}

    assert "uv.lock" not in names


def test_no_registry_host_is_committed() -> None:
    pattern = re.compile("|".join(re.escape(host) for host in sorted(forbidden_hosts())).encode())

    found = [str(path.relative_to(ROOT)) for path in committed() if pattern.search(content(path))]

    assert found == []


def test_no_path_of_this_machine_is_committed() -> None:
    folders = "|".join(re.escape(folder) for folder in sorted(forbidden_folders()))
    pattern = re.compile(rf"(?<![\w.}}~*/-])(?:file://)?(?:{folders})(?![\w-])".encode())

    found = [str(path.relative_to(ROOT)) for path in committed() if pattern.search(content(path))]

    assert found == []


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.name)
def test_every_listed_package_has_hashes_and_no_address(path: Path) -> None:
    text = path.read_text()
    entries = [
        entry
        for entry in text.replace("\\\n", " ").splitlines()
        if entry.strip() and not entry.lstrip().startswith("#")
    ]

    assert entries
    assert [e for e in entries if not re.match(r"[a-z0-9.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", e)] == []
    assert "://" not in text


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").glob("*.in")), ids=lambda path: path.name)
def test_no_hand_written_list_names_an_address(path: Path) -> None:
    options = [line for line in path.read_text().splitlines() if line.startswith("-")]

    assert options == []
    assert "://" not in path.read_text()


@pytest.mark.parametrize("engine", ["engine-cpu", "engine-cuda"])
def test_machines_with_and_without_engine_run_the_same_versions(engine: str) -> None:
    base, full = pins(ROOT / "requirements/base.txt"), pins(ROOT / f"requirements/{engine}.txt")

    different = {
        name: (versions, full.get(name)) for name, versions in base.items() if full.get(name) != versions
    }

    assert different == {}


def test_the_list_of_uv_is_current() -> None:
    assert pins(ROOT / "requirements/uv.txt") == pins(ROOT / "requirements/uv.in")


def test_everything_declared_is_listed() -> None:
    declared = [line for group in WORKSPACE["dependency-groups"].values() for line in group]
    for member in MEMBERS:
        declared += tomllib.loads((ROOT / member / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>=!~; ]", line)[0] for line in declared}

    missing = {name for name in names if not name.startswith("rbee-")} - pins(
        ROOT / "requirements/base.txt"
    ).keys()

    assert missing == set(), "run make lock"


def test_every_member_is_known_to_the_import_rules() -> None:
    assert {name for name, _ in sources()} == SIBLINGS.keys()


def test_members_import_only_the_siblings_they_may() -> None:
    found = {
        str(path.relative_to(ROOT)): wrong
        for name, path in sources()
        if (wrong := roots(path) & SIBLINGS.keys() - SIBLINGS[name] - {name})
    }

    assert found == {}


def test_contracts_import_msgspec_and_the_standard_library_only() -> None:
    allowed = {*sys.stdlib_module_names, "msgspec", "rbee_contracts"}

    found = {
        str(path.relative_to(ROOT)): wrong
        for name, path in sources()
        if name == "rbee_contracts" and (wrong := roots(path) - allowed)
    }

    assert found == {}


def test_members_declare_the_siblings_they_import() -> None:
    for member in MEMBERS:
        project = tomllib.loads((ROOT / member / "pyproject.toml").read_text())["project"]
        declared = {line.replace("-", "_") for line in project["dependencies"] if line.startswith("rbee-")}

        assert declared == SIBLINGS[project["name"].replace("-", "_")]


def test_vllm_is_imported_in_the_engine_package_only() -> None:
    engine = ROOT / "services/worker/src/rbee_worker/engine"

    found = [
        str(path.relative_to(ROOT))
        for _, path in sources()
        if "vllm" in roots(path) and engine not in path.parents
    ]

    assert found == []


@pytest.mark.parametrize(
    "path",
    [path for _, path in sources() if path.name == "__init__.py" and "__all__" in path.read_text()],
    ids=lambda path: path.parent.name,
)
def test_every_exported_name_exists(path: Path) -> None:
    parts = path.parent.parts
    module = importlib.import_module(".".join(parts[len(parts) - parts[::-1].index("src") :]))

    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert len(set(module.__all__)) == len(module.__all__)
