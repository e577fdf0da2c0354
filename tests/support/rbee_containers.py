"""rbee's images and a Docker engine, for tests that run rbee in containers.

What a test starts carries the label `LABEL`, so that whatever is left of it can be found and removed.
"""

import fcntl
import os
import random
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import docker
import pytest
from docker.models.containers import Container

REPOSITORY = Path(__file__).resolve().parents[2]

TAG = "test"
"""Of the images that tests build, so that those of who runs the tests stay as they are."""

LABEL = "rbee.test"
"""On every container, network and volume of a test; its value is the run's id."""

BUILD_LIMIT_S = 2400.0
"""For a new machine, which has to fetch and compile all packages, beside other tests."""

ENGINE_LIMIT_S = 300.0
"""For one request to the engine. Making a container copies files, and a busy disk takes its time."""

UNUSED_PORTS = (20_000, 30_000)
"""No connection begins at one of them, so a port from here stays free while its container is down."""


def find_engine() -> docker.DockerClient:
    """Give a Docker engine that answers, where buildx and compose are there; else skip, and in CI fail."""
    reason = _missing()
    if reason is None:
        return docker.from_env(timeout=int(ENGINE_LIMIT_S))
    if os.environ.get("CI"):
        pytest.fail(f"CI is set, and the tests of the containers cannot run: {reason}", pytrace=False)
    pytest.skip(reason)


def _missing() -> str | None:
    if shutil.which("docker") is None:
        return "there is no program docker here; install Docker"
    for words, what in (
        (["info"], "no Docker engine answers; start one, or name it in DOCKER_HOST"),
        (["buildx", "version"], "docker has no buildx; install its plugin"),
        (["compose", "version"], "docker has no compose; install its plugin"),
    ):
        done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"{what} ({done.stderr.strip()})"
    return None


def run(*command: str | Path, timeout_s: float = 300.0, environ: Mapping[str, str] | None = None) -> str:
    """Run a command in the repository and give its output; fail with all that it said."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env={**os.environ, **(environ or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode} of {' '.join(map(str, command))}:\n{done.stdout}"
    return done.stdout


_WHOLE = b" is all of it"

_ASKED_AT_MOST = 30

_ASK = '"$@" 2>&1; printf "\\n%s is all of it" "$?"'

_DO = """
said=$1; shift
"$@" >"$said" 2>&1
printf "\\n%s is all of it" "$?" >>"$said"
cat "$said"
"""


def ask(container: Container, *command: str) -> tuple[int, str]:
    """Run a command that changes nothing in a container; give its status and all that it says.

    It runs again until its output is whole: the engine drops what it could not copy within two seconds of
    the command's end, which on a busy machine is all of it, and says nothing of that.
    """
    for _ in range(_ASKED_AT_MOST):
        _, said = container.exec_run(["sh", "-c", _ASK, "sh", *command])
        if said.endswith(_WHOLE):
            break
    return _told(said)


def do(container: Container, *command: str, environment: Mapping[str, str]) -> tuple[int, str]:
    """As `ask`, for any command: it runs once, and a file in the container keeps what it says."""
    said_in = f"/var/tmp/said-{uuid.uuid4().hex}"
    _, said = container.exec_run(["sh", "-c", _DO, "sh", said_in, *command], environment=dict(environment))
    for _ in range(_ASKED_AT_MOST):
        if said.endswith(_WHOLE):
            break
        _, said = container.exec_run(["cat", said_in])
    return _told(said)


def _told(said: bytes) -> tuple[int, str]:
    assert said.endswith(_WHOLE), said
    text, _, end = said.rpartition(b"\n")
    return int(end.split()[0]), text.decode(errors="replace")


def unused_port() -> int:
    """Give a port of 127.0.0.1 for a container that is stopped and started again."""
    while True:
        port = random.SystemRandom().randint(*UNUSED_PORTS)  # `random` is seeded anew for each test
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def build(target: str, *options: str, tag: str | None = None) -> str:
    """Build an image of the Dockerfile and give its name; where nothing has changed, in a second.

    Torch comes from pip's find-links where it lies there, as in scripts/setup.py.
    """
    name = tag or f"rbee-{target}:{TAG}"
    command = ["docker", "buildx", "build", "--progress", "plain", "--target", target, "--tag", name]
    wheels = [folder for folder in os.environ.get("PIP_FIND_LINKS", "").split() if Path(folder).is_dir()]
    if wheels:
        command += ["--build-context", f"wheels={wheels[0]}"]
    with _one_build_at_a_time():
        run(*command, *options, REPOSITORY, timeout_s=BUILD_LIMIT_S)
    return name


@contextmanager
def _one_build_at_a_time() -> Iterator[None]:
    """Keep other test processes from building the same layers at the same time."""
    with (Path(tempfile.gettempdir()) / f"rbee-test-images-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_all(client: docker.DockerClient, run_id: str) -> list[str]:
    """Remove every container, network and volume of a run; give the names of what was there."""
    mine = {"label": f"{LABEL}={run_id}"}
    containers = client.containers.list(all=True, filters=mine)
    for container in containers:
        container.remove(force=True, v=True)
    networks = client.networks.list(filters=mine)
    for network in networks:
        network.remove()
    volumes = client.volumes.list(filters=mine)
    for volume in volumes:
        volume.remove(force=True)
    found: Sequence[str] = [thing.name for thing in (*containers, *networks, *volumes)]
    return list(found)
