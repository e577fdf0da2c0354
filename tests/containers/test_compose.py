"""docker-compose.yml, brought up as a user does it: a queen, and a hive with real vLLM and rbee-tiny."""

import json
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from rbee_containers import REPOSITORY, TAG, ask, run, unused_port
from rbee_processes import until
from testcontainers.compose import DockerCompose

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

PROFILES: dict[str, set[str]] = {
    "": {"token", "queen", "hive"},
    "gpu": {"token", "queen", "hive", "hive-gpu"},
    "cluster": {"token", "queen", "hive", "hive-2", "hive-3"},
    "observability": {"token", "queen", "hive", "prometheus", "grafana", "otel-collector"},
}
OWN_SERVICES = ("queen", "hive", "hive-2", "hive-3", "hive-gpu")

PATIENCE_S = 120.0

PAGE = REPOSITORY / "docs/operations/docker.md"

QUESTION = {"role": "user", "content": "What is a job?"}


# --- what the file says ------------------------------------------------------------------------------------


def config(*options: str) -> dict[str, Any]:
    """Give the file as compose understands it."""
    found: dict[str, Any] = json.loads(run("docker", "compose", *options, "config", "--format", "json"))
    return found


@pytest.mark.parametrize("profile", PROFILES, ids=lambda name: name or "none")
def test_each_profile_is_valid_and_has_its_services(engine: docker.DockerClient, profile: str) -> None:
    found = config(*(["--profile", profile] if profile else []))

    assert found["services"].keys() == PROFILES[profile]


def test_every_service_of_rbee_has_what_a_container_should_have(engine: docker.DockerClient) -> None:
    services = config("--profile", "*")["services"]

    for name in OWN_SERVICES:
        service = services[name]
        assert service["init"] is True, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert service["stop_grace_period"] == "1m0s", name  # longer than the drain of 30 s
        assert service["logging"]["driver"] == "local", name  # which bounds them
        assert service["depends_on"]["token"]["condition"] == "service_completed_successfully", name
        assert service["environment"]["RBEE_TOKEN_FILE"] == "/run/rbee/token", name
    for name in OWN_SERVICES[1:]:
        assert services[name]["depends_on"]["queen"]["condition"] == "service_healthy", name
        assert int(services[name]["shm_size"]) >= 1 << 30, name
        assert "ports" not in services[name], name
    assert [port["host_ip"] for s in services.values() for port in s.get("ports", [])] == ["127.0.0.1"] * 3
    (gpus,) = services["hive-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (gpus["driver"], gpus["capabilities"]) == ("nvidia", ["gpu"])
    assert services["hive-gpu"]["build"]["target"] == "hive-cuda"
    loads = {name: services[name]["environment"]["RBEE_PRELOAD"] for name in OWN_SERVICES[1:]}
    assert loads == {"hive": "rbee-tiny", "hive-2": "rbee-tiny", "hive-3": "rbee-tiny", "hive-gpu": ""}


def test_each_image_is_built_by_one_service_and_asked_of_no_registry(engine: docker.DockerClient) -> None:
    services = config("--profile", "*")["services"]
    own = {name: service for name, service in services.items() if service["image"].startswith("rbee-")}

    assert own.keys() == {"token", *OWN_SERVICES}
    assert {service["pull_policy"] for service in own.values()} == {"never"}
    # Two that give the same image at once collide where images are kept by containerd.
    builders = {name: service["image"] for name, service in own.items() if "build" in service}
    assert builders.keys() == {"queen", "hive", "hive-gpu"}
    assert set(builders.values()) == {service["image"] for service in own.values()}


def test_the_example_of_settings_has_all_of_them_with_their_defaults(engine: docker.DockerClient) -> None:
    text = (REPOSITORY / "docker-compose.yml").read_text()
    used = set(re.findall(r"\$\{([A-Z_]+)", text)) | set(
        re.findall(r"^ +([A-Z_]+):(?: #.*)?$", text, re.MULTILINE)
    )
    example = (REPOSITORY / ".env.example").read_text()

    assert set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE)) == used
    assert config("--env-file", ".env.example", "--profile", "*") == config(
        "--env-file", "/dev/null", "--profile", "*"
    )


def test_what_the_profiles_mount_is_there(engine: docker.DockerClient) -> None:
    services = config("--profile", "*")["services"]
    binds = {
        Path(volume["source"])
        for service in services.values()
        for volume in service.get("volumes", [])
        if volume["type"] == "bind"
    }

    assert {path for path in binds if not path.exists()} == set()
    assert len(binds) == 4


# --- the token ---------------------------------------------------------------------------------------------


class Token:
    """The service `token` of a compose project alone, and what it leaves in the volume."""

    def __init__(self, engine: docker.DockerClient, image: str) -> None:
        self.project = f"rbee-test-{uuid.uuid4().hex[:8]}"
        self.engine = engine
        self.image = image

    def compose(self, *words: str, file: Path | None = None) -> str:
        environ = {"RBEE_TAG": TAG, "RBEE_TOKEN_FILE": str(file or "/dev/null")}
        return run("docker", "compose", "--project-name", self.project, *words, environ=environ)

    def after(self, file: Path | None = None) -> str:
        self.compose("up", "--exit-code-from", "token", "token", file=file)
        volume = {f"{self.project}_token": {"bind": "/token", "mode": "ro"}}
        words = ["-c", "stat -c %a /token/token; cat /token/token"]
        said = self.engine.containers.run(
            self.image, words, entrypoint="sh", volumes=volume, network_mode="none", remove=True
        )
        mode, token, end = said.decode().split("\n")
        assert (mode, end) == ("444", "")
        return str(token)

    def said(self) -> str:
        """Give what the service has logged; compose itself may end before it has shown all of it."""
        mine = {"label": f"com.docker.compose.project={self.project}"}
        (container,) = self.engine.containers.list(all=True, filters=mine)
        return str(container.logs().decode())


@pytest.fixture
def token(engine: docker.DockerClient, image: Callable[[str], str]) -> Iterator[Token]:
    token = Token(engine, image("queen"))
    try:
        yield token
    finally:
        token.compose("down", "--volumes")


def written(path: Path, text: str) -> Path:
    """Write a file as its owner keeps a secret: for nobody else, and not for the containers' user."""
    path.write_bytes(text.encode())
    path.chmod(0o600)
    return path


def test_a_token_is_made_once_and_another_file_replaces_it(token: Token, tmp_path: Path) -> None:
    made = token.after()
    assert re.fullmatch("[0-9a-f]{64}", made)
    assert token.after() == made

    assert (
        token.after(written(tmp_path / "first", "the-first-token-of-a-test\r\n"))
        == "the-first-token-of-a-test"
    )
    assert (
        token.after(written(tmp_path / "second", "the-second-token-of-a-test"))
        == "the-second-token-of-a-test"
    )
    assert token.after() == "the-second-token-of-a-test"


@pytest.mark.parametrize(
    ("text", "cause"),
    [("\n", "is empty; make one with `openssl rand -hex 32`"), ("short", "is shorter than 16 characters")],
    ids=["empty", "short"],
)
def test_a_file_that_holds_no_token_is_refused_rather_than_replaced(
    token: Token, tmp_path: Path, text: str, cause: str
) -> None:
    with pytest.raises(AssertionError, match="status 1 of docker compose"):
        token.after(written(tmp_path / "token", text))
    assert f"the token in /run/secrets/token {cause}" in token.said()


# --- a stack that runs -------------------------------------------------------------------------------------


class Stack:
    """One `docker compose` project, and what is asked of its queen."""

    def __init__(self, compose: DockerCompose, settings: dict[str, str], engine: docker.DockerClient) -> None:
        self.compose = compose
        self.settings = settings
        self.project = settings["COMPOSE_PROJECT_NAME"]
        self.url = f"http://127.0.0.1:{settings['RBEE_PORT']}"
        self.engine = engine

    def exec(self, service: str, *words: str) -> str:
        said, _, _ = self.compose.exec_in_container([*words], service)
        return str(said)

    def example(self, name: str) -> str:
        """Run the command that docs/operations/docker.md shows under a mark; give its output."""
        found = re.search(rf"<!-- test: {name} -->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
        assert found is not None
        command = found[1].replace("http://localhost:7833", self.url)
        return run("bash", "-euc", command, timeout_s=600, environ=self.settings)

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.exec('queen', 'cat', '/run/rbee/token').strip()}"}

    def chat(self) -> list[str]:
        """Ask for a streamed completion; give its lines."""
        body = {
            "model": "rbee-tiny",
            "messages": [QUESTION],
            "stream": True,
            "max_tokens": 300,
            "temperature": 0,
            "ignore_eos": True,
        }
        url = f"{self.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=self.auth, timeout=PATIENCE_S) as answer:
            assert answer.status_code == 200, answer.read()
            return [line for line in answer.iter_lines() if line]

    def jobs(self) -> dict[str, str]:
        """Give the state of each job that the queen knows."""
        listed = self.get("/v1/jobs").json()["jobs"]
        return {job["job_id"]: job["state"] for job in listed}

    def get(self, path: str, auth: dict[str, str] | None = None) -> httpx.Response:
        """Ask the queen, with the cluster's token unless another one is given."""
        headers = self.auth if auth is None else auth
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=PATIENCE_S)

    def until_model_is_served(self) -> None:
        """Wait until the queen has heard of the worker: docker may know of its health before."""

        def is_served() -> bool:
            return any(model["state"] == "ready" for model in self.get("/v1/models").json()["data"])

        until(is_served, "the queen knows of the ready worker", PATIENCE_S)

    def mine(self) -> dict[str, docker.models.containers.Container]:
        """Give the project's containers, ended ones too, by service."""
        found = self.engine.containers.list(
            all=True, filters={"label": f"com.docker.compose.project={self.project}"}
        )
        return {container.labels["com.docker.compose.service"]: container for container in found}


@pytest.fixture(scope="module")
def stack(
    engine: docker.DockerClient, image: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """What `docker compose up --wait` brings; nothing of it is there afterwards."""
    for target in ("queen", "hive-cpu"):
        image(target)
    settings = {
        "COMPOSE_PROJECT_NAME": f"rbee-test-{uuid.uuid4().hex[:8]}",
        "RBEE_TAG": TAG,
        "RBEE_PORT": str(unused_port()),
    }
    file = tmp_path_factory.mktemp("compose") / "settings"
    file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    with DockerCompose(REPOSITORY, env_file=str(file)) as compose:
        stack = Stack(compose, settings, engine)
        stack.until_model_is_served()
        yield stack
    label = {"label": f"com.docker.compose.project={settings['COMPOSE_PROJECT_NAME']}"}
    assert engine.containers.list(all=True, filters=label) == []
    assert engine.volumes.list(filters=label) == []
    assert engine.networks.list(filters=label) == []


def test_it_comes_up_healthy_and_answers_a_streamed_chat(stack: Stack) -> None:
    def states() -> dict[str, Any]:
        return {name: container.attrs["State"] for name, container in stack.mine().items()}

    healthy = {"token": None, "queen": "healthy", "hive": "healthy"}
    until(
        lambda: {name: state.get("Health", {}).get("Status") for name, state in states().items()} == healthy,
        "all of it is healthy",
        PATIENCE_S,
    )
    token = states()["token"]
    assert (token["Status"], token["ExitCode"]) == ("exited", 0)

    *chunks, last = (line.removeprefix("data: ") for line in stack.chat())

    assert last == "[DONE]"
    answered = [json.loads(chunk) for chunk in chunks]
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in answered]
    assert len([text for text in texts if text]) > 3
    assert answered[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert answered[-1]["system_fingerprint"].startswith("vllm-")


def test_nothing_is_answered_without_the_token(stack: Stack) -> None:
    assert stack.get("/v1/models", auth={}).status_code == 401
    assert stack.get("/v1/models", auth={"Authorization": "Bearer no"}).status_code == 401
    listed = stack.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["rbee-tiny"]


def test_nobody_in_it_is_root_and_nothing_in_it_can_be_changed(stack: Stack) -> None:
    for service in ("queen", "hive"):
        script = (
            "grep -E '^(Uid|CapEff|NoNewPrivs):' /proc/*/status | cut -d: -f2- | sort -u; touch /opt/rbee/x"
        )
        code, said = ask(stack.mine()[service], "sh", "-c", script)

        assert code != 0
        assert "Read-only file system" in said
        lines = said.split("\n")
        assert [line.split() for line in lines if line.startswith("Uid")] == [["Uid:", *["10001"] * 4]]
        assert [line.split() for line in lines if line.startswith("CapEff")] == [["CapEff:", "0" * 16]]
        assert [line.split() for line in lines if line.startswith("NoNewPrivs")] == [["NoNewPrivs:", "1"]]


def test_the_examples_of_the_documentation(stack: Stack) -> None:
    chunks = stack.example("compose-chat")
    assert '"delta":{"content":' in chunks
    assert chunks.rstrip().endswith("data: [DONE]")

    status = stack.example("compose-status")
    assert re.search(r"^hive +online", status, re.MULTILINE)
    assert re.search(r"^rbee-tiny-\w+ +rbee-tiny +(ready|busy) +hive", status, re.MULTILINE)


def test_what_was_kept_is_there_after_a_stop_in_order(stack: Stack) -> None:
    stack.chat()
    auth = stack.auth
    stack.exec("hive", "mkdir", "/models/kept")
    jobs = stack.jobs()
    assert jobs

    stack.example("compose-stop")
    ended = {name: container.attrs["State"] for name, container in stack.mine().items()}
    assert {name: state["ExitCode"] for name, state in ended.items()} == {"token": 0, "queen": 0, "hive": 0}
    assert not any(state["OOMKilled"] for state in ended.values())
    # Each container that runs has a process on the machine that names it.
    ids = [str(container.id) for container in stack.mine().values()]

    def are_gone() -> bool:
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        return not any(each in running for each in ids)

    until(are_gone, "no process of the containers is left", PATIENCE_S)

    stack.example("compose-up")
    assert stack.jobs() == jobs
    assert stack.auth == auth
    assert stack.exec("hive", "ls", "/models").split() == ["kept"]
    stack.until_model_is_served()
    assert stack.chat()[-1] == "data: [DONE]"
