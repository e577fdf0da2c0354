"""The images: what is in them, who runs in them, and what a build takes from where."""

import json
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import pytest
from rbee_containers import BUILD_LIMIT_S, LABEL, REPOSITORY, ask, build, find_engine
from rbee_processes import until
from testcontainers.core.container import DockerContainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

Image = Callable[[str], str]

PORTS = {"queen": 7833, "hive": 7835, "hive-cpu": 7835}
LISTS = {"queen": "base", "hive": "base", "hive-cpu": "engine-cpu"}
ADDED_BYTES = {"queen": 200 << 20, "hive": 200 << 20, "hive-cpu": 3 << 30}
"""What an image may add to the one that it is built on."""

OWN = re.compile(r"rbee-[a-z-]+")

PACKAGES = """
import json
from importlib import metadata, util

found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}
torch = found.pop("torch", "none")
print(json.dumps({"packages": found, "torch": torch, "compiled": util.find_spec("starlette").cached}))
"""


def ended(
    engine: docker.DockerClient, run_id: str, image: str, command: list[str], **options: Any
) -> tuple[int, str]:
    """Run a fresh container to its end; give its exit status and all that it said."""
    container = engine.containers.run(image, command, detach=True, labels={LABEL: run_id}, **options)
    try:
        status = container.wait()["StatusCode"]
        return int(status), container.logs().decode()
    finally:
        container.remove(force=True, v=True)


def inside(engine: docker.DockerClient, run_id: str, image: str, *command: str) -> str:
    """Run a program in a container that may write nowhere, and give what it printed."""
    program, *words = command
    status, said = ended(
        engine, run_id, image, words, entrypoint=program, read_only=True, network_mode="none"
    )
    assert status == 0, said
    return said


@pytest.mark.parametrize("target", PORTS)
def test_an_image_says_how_it_is_run(
    engine: docker.DockerClient, image: Image, run_id: str, target: str
) -> None:
    config = engine.images.get(image(target)).attrs["Config"]
    program = "rbee-queen" if target == "queen" else "rbee-hive"

    assert config["User"] == "rbee"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"][0] == program
    assert list(config["ExposedPorts"]) == [f"{PORTS[target]}/tcp"]
    assert config["Healthcheck"]["Test"][-1] == f"http://127.0.0.1:{PORTS[target]}"
    assert config["Labels"]["org.opencontainers.image.title"] == "rbee"
    folders = sorted(config["Volumes"])
    assert folders == (["/var/lib/rbee"] if target == "queen" else ["/models", "/var/lib/rbee"])
    # Whoever runs in it can write to the volumes, and to nothing that is run.
    owners = f"find {' '.join(folders)} -printf '%u\\n'; stat -c %U /opt/rbee/bin/{program}"
    script = f"id -un; id -u; {owners}; rbee --version"
    *users, version = inside(engine, run_id, image(target), "sh", "-c", script).split("\n")[:-1]
    assert users == ["rbee", "10001", *["rbee"] * len(folders), "root"]
    assert "0.1.0" in version


@pytest.mark.parametrize("target", PORTS)
def test_an_image_is_no_larger_than_it_must_be(
    engine: docker.DockerClient, image: Image, target: str
) -> None:
    base = engine.images.get("python:3.12-slim").attrs["Size"]
    added = engine.images.get(image(target)).attrs["Size"] - base
    print(f"{target} adds {added / (1 << 20):.0f} MiB")

    assert added < ADDED_BYTES[target]


@pytest.mark.parametrize("target", PORTS)
def test_the_packages_are_those_of_the_list(
    engine: docker.DockerClient, image: Image, run_id: str, target: str
) -> None:
    found = json.loads(inside(engine, run_id, image(target), "python", "-c", PACKAGES))
    listed = (REPOSITORY / f"requirements/{LISTS[target]}.txt").read_text()
    pins: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9.-]+)==([^\s;]+)", listed, re.MULTILINE):
        pins.setdefault(name, set()).add(version)
    packages: dict[str, str] = found["packages"]
    own = {name for name in packages if OWN.fullmatch(name)}
    others = {name: version for name, version in packages.items() if name not in own}

    assert {n: v for n, v in others.items() if v not in pins.get(n, set())} == {}, "run make lock"
    service = {"rbee-queen"} if target == "queen" else {"rbee-hive", "rbee-worker"}
    assert own == {"rbee-contracts", "rbee-job-client", "rbee-job-server", "rbee-keeper"} | service
    torch = re.findall(r"^torch==(.+)$", (REPOSITORY / "requirements/torch-cpu.in").read_text(), re.MULTILINE)
    assert found["torch"].partition("+")[0] == (torch[0] if target == "hive-cpu" else "none")
    assert inside(engine, run_id, image(target), "ls", found["compiled"])


@pytest.mark.parametrize("target", ["queen", "hive"])
def test_a_service_that_others_can_reach_is_not_started_without_a_token(
    engine: docker.DockerClient, image: Image, run_id: str, target: str
) -> None:
    status, said = ended(engine, run_id, image(target), [])

    assert status == 2
    assert "needs a token: make one with `openssl rand -hex 32`" in said


def test_a_container_is_healthy_once_its_service_takes_work_and_ends_with_0(
    engine: docker.DockerClient, image: Image, run_id: str
) -> None:
    queen = (
        DockerContainer(image("queen"))
        .with_env("RBEE_TOKEN", "a-token-of-a-test-cluster")
        .with_kwargs(labels={LABEL: run_id}, read_only=True, cap_drop=["ALL"])
    )
    with queen:
        container = queen.get_wrapped_container()

        def health() -> str:
            container.reload()
            return str(container.attrs["State"]["Health"]["Status"])

        until(lambda: health() == "healthy", "the queen's container is healthy", 120)
        check = ("python", "/usr/local/lib/rbee/healthcheck.py")
        code, said = ask(container, *check, "http://127.0.0.1:7833")
        assert (code, json.loads(said)) == (0, {"ready": True})
        stranger = ("env", "RBEE_TOKEN=another-token-than-hers")
        code, said = ask(container, *stranger, *check, "http://127.0.0.1:7833")
        assert (code, json.loads(said)["code"]) == (1, "unauthorized")
        code, said = ask(container, *check, "http://127.0.0.1:1")
        assert code == 1
        assert said.startswith("no answer: ")
        container.stop(timeout=90)
        assert container.wait()["StatusCode"] == 0
    queen.get_docker_client().client.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the images are built from, for a test to change."""
    for name in ("deploy/docker", "packages", "requirements", "services"):
        shutil.copytree(
            REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "tests")
        )
    for name in ("Dockerfile", ".dockerignore"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def built_from(folder: Path, target: str) -> subprocess.CompletedProcess[str]:
    command = ["docker", "buildx", "build", "--progress", "plain", "--output", "type=cacheonly"]
    return subprocess.run(
        [*command, "--target", target, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_LIMIT_S,
        check=False,
    )


def test_a_change_of_the_sources_installs_no_package_anew(image: Image, copy: Path) -> None:
    image("queen")
    with (copy / "services/queen/src/rbee_queen/__init__.py").open("a") as source:
        # As no earlier run of this test has changed it: the engine keeps the layers of those.
        source.write(f"# changed: {uuid.uuid4()}\n")
    done = built_from(copy, "queen")

    assert done.returncode == 0, done.stdout
    steps = dict(re.findall(r"^#(\d+) \[(queen[a-z-]*) .*\] RUN", done.stdout, re.MULTILINE))
    cached = {name: f"\n#{step} CACHED" in done.stdout for step, name in steps.items()}
    assert cached == {"queen-packages": True, "queen": False}, done.stdout


def test_a_package_with_another_hash_than_the_lists_ends_the_build(image: Image, copy: Path) -> None:
    image("queen")
    path = copy / "requirements/base.txt"
    text = path.read_text()
    start = text.index("\nstarlette==")
    end = text.index("    # via", start)
    path.write_text(
        text[:start] + re.sub(r"sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}", text[start:end]) + text[end:]
    )
    done = built_from(copy, "queen")

    assert done.returncode != 0
    assert "Hash mismatch for `starlette==" in done.stdout


def test_an_image_that_is_built_again_is_the_same(engine: docker.DockerClient, image: Image) -> None:
    before = engine.images.get(image("queen")).id

    build("queen")

    assert engine.images.get(image("queen")).id == before


@pytest.mark.parametrize(
    ("ci", "outcome"),
    [("", pytest.skip.Exception), ("true", pytest.fail.Exception)],
    ids=["at home", "in CI"],
)
def test_without_an_engine_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    monkeypatch.setenv("CI", ci)

    with pytest.raises(outcome, match="no Docker engine answers; start one, or name it in DOCKER_HOST"):
        find_engine()
