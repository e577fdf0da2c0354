"""A queen and three hives in containers on a private network, and clients of them that sit outside.

Workers run the sim engine. What it answers to a prompt is known, so that a token that is lost, doubled or out
of order is seen by its content.
"""

import itertools
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import docker
import httpx
from docker.errors import APIError
from docker.models.containers import Container
from docker.types import IPAMConfig, IPAMPool
from rbee_containers import LABEL, ask, unused_port
from rbee_processes import stream, text_of, until
from rbee_restarts import Reader

from rbee_worker.engine.sim import SimParameters
from rbee_worker.engine.sim.text import Text, hash_prompt

HIVES = ("h1", "h2", "h3")

WORKERS_EACH = 2

TALK = "talk"
"""The model of the workers that every hive has from the start."""

STEP_MS = "25"
"""Of these workers: 40 tokens a second to each of their requests."""

MUTE = "mute"
"""A model for workers that take requests and say nothing."""

SILENT = ("--sim-step-ms", "3600000")
"""What makes a worker mute."""

TERMINAL = ("execute_complete", "execute_error", "execute_cancelled", "execute_timeout")

READ_LIMIT_S = 240.0
"""For a stream to come to its end."""

RETURN_LIMIT_S = 120
"""What a job gives its reader to come back: a busy machine may keep a client from it for longer than 5 s."""

STOP_LIMIT_S = 90
"""What the engine gives a service to stop until it is killed; more than any service here drains."""

HIVE_JOBS = """
import os, sys, urllib.request
bearer = {"Authorization": "Bearer " + os.environ["RBEE_TOKEN"]}
request = urllib.request.Request("http://127.0.0.1:7835/v1/jobs?limit=1000", headers=bearer)
sys.stdout.write(urllib.request.urlopen(request, timeout=30).read().decode())
"""
"""Reads a hive's jobs inside its container, also while that is on no network."""


def answer_to(prompt: str, tokens: int) -> str:
    """Give the text with which the sim engine answers."""
    _, seed = hash_prompt(prompt, SimParameters().block_tokens)
    text = Text(seed=seed, max_tokens=tokens)
    return "".join(text.next()[0] for _ in range(tokens))


class JobStream(Reader):
    """One inference as a job, read beside the test across any number of broken connections."""

    def __init__(self, cluster: "ContainerCluster", job_id: str, prompt: str, tokens: int) -> None:
        super().__init__(cluster.url, job_id, **cluster.auth)
        self.prompt = prompt
        self.tokens = tokens
        self.reading: Future[Reader] | None = None

    @property
    def had(self) -> int:
        """How many tokens have come."""
        return sum(event["action"] == "token" for event in list(self.events))

    @property
    def narrated(self) -> list[str]:
        return [event["action"] for event in list(self.events) if event["action"] != "token"]

    @property
    def hive_id(self) -> str:
        """Where it runs, or ran last."""
        return str(self._last("infer_schedule")["data"]["hive_id"])

    @property
    def error(self) -> dict[str, Any]:
        return self._last("error")

    @property
    def record_state(self) -> str:
        """What the queen's record of it must say."""
        return {"execute_complete": "completed", "execute_cancelled": "cancelled"}.get(
            self.events[-1]["action"], "failed"
        )

    def _last(self, action: str) -> dict[str, Any]:
        return next(event for event in reversed(list(self.events)) if event["action"] == action)

    def until_end(self) -> Self:
        assert self.reading is not None
        self.reading.result(READ_LIMIT_S + 10)
        return self

    def check_order(self) -> None:
        """Fail unless it was told once and in order, began with `execute` and has one end, its last event."""
        assert self.done
        assert len(set(self.ids)) == len(self.ids)
        counts = [tuple(map(int, event_id.split("-"))) for event_id in self.ids]
        assert counts == sorted(counts)
        assert self.narrated[0] == "execute"
        assert [action for action in self.narrated if action in TERMINAL] == [self.events[-1]["action"]]
        assert [e["index"] for e in self.events if e["action"] == "token"] == list(range(self.had))

    def check_whole(self) -> None:
        """Fail unless it has completed with exactly the text that the engine produces."""
        self.check_order()
        assert self.events[-1]["action"] == "execute_complete", self.events[-2:]
        assert text_of(self.events) == answer_to(self.prompt, self.tokens)
        assert "error" not in self.narrated

    def check_failed(self, *codes: str) -> None:
        """Fail unless it had begun to speak and has failed with one error, which says not to try again."""
        self.check_order()
        assert self.had
        assert answer_to(self.prompt, self.tokens).startswith(text_of(self.events))
        assert self.narrated[-2:] == ["error", "execute_error"]
        assert self.narrated.count("error") == 1
        assert self.error["code"] in codes, self.error
        assert self.error["retryable"] is False
        assert self.error["message"]


class ChatStream:
    """One streamed chat completion, read beside the test as it comes over the wire."""

    def __init__(self, cluster: "ContainerCluster", prompt: str, tokens: int, model: str = TALK) -> None:
        self.tokens = tokens
        self.status: int | None = None
        self.job_id = ""
        self.data: list[str] = []
        self.is_cut = False
        self.reading: Future[Self] | None = None
        self._url = f"{cluster.url}/v1/chat/completions"
        self._auth = cluster.auth
        self._prompt = prompt
        self._model = model

    def read(self) -> Self:
        """Read it to its end; nothing of it can be read again."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": self._prompt}],
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            with httpx.stream("POST", self._url, json=body, headers=self._auth, timeout=90) as answer:
                self.status = answer.status_code
                self.job_id = answer.headers.get("X-Job-ID", "")
                for line in answer.iter_lines() if self.status == 200 else ():
                    if line:
                        assert line.startswith("data: "), line
                        self.data.append(line.removeprefix("data: "))
        except httpx.TransportError:
            self.is_cut = True
        return self

    @property
    def text(self) -> str:
        frames = [json.loads(data) for data in list(self.data) if data != "[DONE]"]
        choices = [choice for frame in frames for choice in frame.get("choices", ())]
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    @property
    def had(self) -> int:
        return self.text.count(" tok")

    def until_end(self) -> Self:
        assert self.reading is not None
        self.reading.result(READ_LIMIT_S + 10)
        return self

    @property
    def has_error(self) -> bool:
        return any(data.startswith('{"error":') for data in self.data)

    @property
    def record_state(self) -> str:
        """What the queen's record of it must say."""
        return "failed" if self.has_error else "completed"

    @property
    def expected(self) -> str:
        return answer_to(f"<|user|>{self._prompt}\n<|assistant|>", self.tokens)

    def check_whole(self) -> None:
        """Fail unless it has ended with all of its text and `[DONE]`."""
        assert (self.status, self.is_cut) == (200, False), self.data[-2:]
        assert self.text == self.expected
        assert json.loads(self.data[-2])["choices"][0]["finish_reason"] == "length"
        assert self.data.count("[DONE]") == 1
        assert self.data[-1] == "[DONE]"

    def check_failed(self, *codes: str) -> None:
        """Fail unless it had begun to speak and has ended with one error and `[DONE]`."""
        assert (self.status, self.is_cut) == (200, False)
        assert self.had
        assert self.expected.startswith(self.text)
        assert self.data[-1] == "[DONE]"
        errors = [json.loads(data)["error"] for data in self.data if data.startswith('{"error":')]
        assert [error["code"] in codes for error in errors] == [True], errors
        assert json.loads(self.data[-2]) == {"error": errors[0]}


class ContainerCluster:
    """A queen at a port of 127.0.0.1, and three hives that only she and each other reach.

    Args:
        image: gives the image of a target of the Dockerfile.
        queen_args: her flags.
        hive_environment: settings of the hives.
    """

    def __init__(
        self,
        engine: docker.DockerClient,
        image: Callable[[str], str],
        run_id: str,
        *queen_args: str,
        hive_environment: dict[str, str] | None = None,
    ) -> None:
        self._engine = engine
        self._labels = {LABEL: run_id}
        self._name = f"rbee-{run_id}-{uuid.uuid4().hex[:6]}"
        token = uuid.uuid4().hex
        self.auth = {"Authorization": f"Bearer {token}"}
        self.is_closed = threading.Event()
        """Set when it is gone, so that its clients end."""
        self._pool = ThreadPoolExecutor(64)
        self._prompts = itertools.count()
        self._closing: list[Any] = []
        self.hives: dict[str, Container] = {}
        try:
            self._network = self._private_network()
            state = engine.volumes.create(f"{self._name}-queen", labels=self._labels)
            self._closing.append(state)
            port = unused_port()
            self.url = f"http://127.0.0.1:{port}"
            self.queen = self._start(
                "queen",
                image("queen"),
                *queen_args,
                environment={"RBEE_TOKEN": token},
                ports={"7833/tcp": ("127.0.0.1", port)},
                volumes={state.name: {"bind": "/var/lib/rbee", "mode": "rw"}},
            )
            for hive_id in HIVES:
                environment = {
                    "RBEE_TOKEN": token,
                    "RBEE_HIVE_ID": hive_id,
                    "RBEE_QUEEN_URL": f"http://{self._name}-queen:7833",
                    "RBEE_WORKER_ENGINE": "sim",
                    # A mute worker is not taken for one whose engine hangs.
                    "RBEE_WORKERS_PROBE_EVERY_S": "3600",
                    "RBEE_WORKERS_STALL_S": "3600",
                }
                self.hives[hive_id] = self._start(
                    hive_id, image("hive"), environment=environment | (hive_environment or {})
                )
            self.until_queen_answers()
            for hive_id in HIVES:
                self.until_state(hive_id, "online")
            with ThreadPoolExecutor(len(HIVES)) as pool:
                list(pool.map(self.spawn_talkers, HIVES))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._show_logs()
        self.close()

    def close(self) -> None:
        """Remove all of it; who still reads is cut."""
        self.is_closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for thing in reversed(self._closing):
            if isinstance(thing, Container):
                thing.remove(force=True, v=True)
            else:
                thing.remove()
        self._closing.clear()

    def _private_network(self) -> Any:
        """Make a network on which containers can ask for an address: one whose subnet was named."""
        while True:
            unnamed = self._engine.networks.create(self._name, labels=self._labels)
            unnamed.reload()
            subnet = unnamed.attrs["IPAM"]["Config"][0]["Subnet"]
            unnamed.remove()
            try:
                network = self._engine.networks.create(
                    self._name,
                    labels=self._labels,
                    ipam=IPAMConfig(pool_configs=[IPAMPool(subnet=subnet)]),
                )
            except APIError as exc:
                if "overlaps" not in str(exc):
                    raise
                continue  # another one was given it meanwhile
            self._closing.append(network)
            self._subnet = str(subnet)
            return network

    def _start(self, name: str, image: str, *command: str, **options: Any) -> Container:
        container = self._engine.containers.create(
            image,
            list(command),
            name=f"{self._name}-{name}",
            labels=self._labels,
            network=self._network.name,
            init=True,
            healthcheck={"test": ["NONE"]},  # its process would be one more in the container, now and then
            **options,
        )
        self._closing.append(container)
        container.start()
        return container

    def _show_logs(self) -> None:
        """Print what pytest shows where a test has failed."""
        for container in [thing for thing in self._closing if isinstance(thing, Container)]:
            print(f"--- the end of what {container.name} has logged:")
            print(container.logs(tail=80).decode(errors="replace"))

    # --- what is asked of the queen ----------------------------------------------------------------------

    def get(self, path: str) -> Any:
        answer = httpx.get(f"{self.url}{path}", headers=self.auth, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def record(self, job_id: str) -> dict[str, Any]:
        """Give a job's record at the queen."""
        found: dict[str, Any] = self.get(f"/v1/jobs/{job_id}")
        return found

    def submit(self, operation: dict[str, Any], **headers: str) -> str:
        answer = httpx.post(f"{self.url}/v1/jobs", json=operation, headers=self.auth | headers, timeout=30)
        assert answer.status_code in (200, 202), answer.text
        return str(answer.json()["job_id"])

    def run(self, operation: dict[str, Any]) -> Any:
        """Run an operation that must complete; give its result."""
        with stream(self.url, self.submit(operation), **self.auth) as frames:
            last = [event for _, event in frames][-1]
        assert last["action"] == "execute_complete", last
        return last["data"]

    def until_hive(
        self, hive_id: str, is_so: Callable[[dict[str, Any]], bool], what: str, timeout_s: float = 90.0
    ) -> dict[str, Any]:
        """Follow the queen's heartbeats until they tell something of a hive; give what they tell."""
        deadline = time.monotonic() + timeout_s
        url = f"{self.url}/v1/heartbeats/stream"
        with httpx.stream("GET", url, headers=self.auth, timeout=30) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    hives: list[dict[str, Any]] = json.loads(line.removeprefix("data: "))["hives"]
                    for hive in hives:
                        if hive["hive_id"] == hive_id and is_so(hive):
                            return hive
                assert time.monotonic() < deadline, f"after {timeout_s:g} s still not: {what}"
        raise AssertionError("the queen closed her heartbeats")

    def hive_info(self, hive_id: str) -> dict[str, Any]:
        """Give what the queen knows of a hive."""
        return self.until_hive(hive_id, lambda _: True, f"{hive_id} is known")

    def until_state(self, hive_id: str, state: str) -> None:
        self.until_hive(hive_id, lambda hive: hive["state"] == state, f"{hive_id} is {state}")

    def until_queen_answers(self) -> None:
        def is_there() -> bool:
            try:
                return httpx.get(f"{self.url}/health", timeout=30).status_code == 200
            except httpx.TransportError:
                return False

        until(is_there, "the queen answers", 90)

    def spawn(self, hive_id: str, model: str, *args: str) -> dict[str, Any]:
        operation = {"operation": "worker_spawn", "model": model, "worker_args": list(args)}
        spawned: dict[str, Any] = self.run(operation | {"hive_id": hive_id})
        return spawned

    def spawn_talkers(self, hive_id: str) -> None:
        for _ in range(WORKERS_EACH):
            self.spawn(hive_id, TALK, "--sim-step-ms", STEP_MS)

    def workers(self, hive_id: str) -> list[dict[str, Any]]:
        """Give a hive's workers as the hive itself lists them."""
        found: list[dict[str, Any]] = self.run({"operation": "worker_list", "hive_id": hive_id})["workers"]
        return found

    def until_idle(self, hive_id: str) -> None:
        """Wait until no engine of a hive runs a request."""

        def is_idle(hive: dict[str, Any]) -> bool:
            return not any(worker["running"] or worker["waiting"] for worker in hive["workers"])

        self.until_hive(hive_id, is_idle, f"the engines of {hive_id} are free")

    # --- clients -----------------------------------------------------------------------------------------

    def infer(self, tokens: int, model: str = TALK, **fields: Any) -> dict[str, Any]:
        """Make an inference with a prompt of its own."""
        return {
            "operation": "infer",
            "model": model,
            "prompt": f"prompt {next(self._prompts)}",
            "max_tokens": tokens,
            "ignore_eos": True,
            "resume_window_s": RETURN_LIMIT_S,
        } | fields

    def ask(self, tokens: int, model: str = TALK, **fields: Any) -> JobStream:
        """Submit an inference and read it beside the test."""
        operation = self.infer(tokens, model, **fields)
        return self.follow(self.submit(operation), operation)

    def follow(self, job_id: str, operation: dict[str, Any]) -> JobStream:
        """Read the job of an inference beside the test."""
        asked = JobStream(self, job_id, operation["prompt"], operation["max_tokens"])
        asked.reading = self._pool.submit(asked.read, READ_LIMIT_S)
        return asked

    def new_chat(self, tokens: int) -> ChatStream:
        return ChatStream(self, f"prompt {next(self._prompts)}", tokens)

    def chat(self, tokens: int) -> ChatStream:
        """Ask for a streamed chat completion and read it beside the test."""
        asked = self.new_chat(tokens)
        asked.reading = self._pool.submit(asked.read)
        return asked

    def beside(self, work: Callable[[], Any]) -> Future[Any]:
        """Do something beside the test."""
        return self._pool.submit(work)

    def until_all_speak(self, streams: Iterable[JobStream | ChatStream]) -> None:
        asked = list(streams)
        until(lambda: all(one.had >= 20 for one in asked), "every stream is under way", 90)

    def hive_of(self, asked: JobStream | ChatStream) -> str:
        """Tell where it runs."""
        if isinstance(asked, JobStream):
            return asked.hive_id
        with stream(self.url, asked.job_id, **self.auth) as frames:
            decided = next(event for _, event in frames if event["action"] == "infer_schedule")
        return str(decided["data"]["hive_id"])

    def check_ran_once(self, streams: Sequence[JobStream | ChatStream]) -> None:
        """Fail unless each was sent to one hive, once, and ran there once."""
        children = [self.record(asked.job_id)["children"] for asked in streams]
        assert [len(each) for each in children] == [1] * len(streams)

    # --- what is inside ----------------------------------------------------------------------------------

    def hive_jobs(self, hive_id: str) -> list[dict[str, Any]]:
        """Give the inferences that a hive knows."""
        status, output = ask(self.hives[hive_id], "python", "-c", HIVE_JOBS)
        assert status == 0, output
        jobs = json.loads(output)["jobs"]
        return [job for job in jobs if job["operation"] in ("infer", "openai")]

    def hive_job_states(self, hive_id: str) -> Counter[str]:
        return Counter(job["state"] for job in self.hive_jobs(hive_id))

    def processes(self, hive_id: str) -> Counter[str]:
        """Count the processes in a hive's container by what they are."""
        top = self.hives[hive_id].top()
        commands = [line[top["Titles"].index("CMD")] for line in top["Processes"]]
        return Counter(_kind(command) for command in commands)

    def logged(self, name: str, event: str) -> list[dict[str, Any]]:
        """Give the lines that a hive, or the `queen`, has logged of one thing in all of its starts."""
        container = self.queen if name == "queen" else self.hives[name]
        lines = container.logs().decode(errors="replace").splitlines()
        told = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in told if line["event"] == event]

    def address(self, hive_id: str) -> str:
        self.hives[hive_id].reload()
        networks = self.hives[hive_id].attrs["NetworkSettings"]["Networks"]
        return str(networks[self._network.name]["IPAddress"])

    def other_address(self) -> str:
        """Give an address of the network that nobody has."""
        return self._subnet.rpartition("/")[0].rpartition(".")[0] + ".200"

    # --- faults ------------------------------------------------------------------------------------------

    def disconnect(self, hive_id: str) -> None:
        self._network.disconnect(self.hives[hive_id])

    def connect(self, hive_id: str, address: str) -> None:
        self._network.connect(self.hives[hive_id], ipv4_address=address)

    def restart_hive(self, hive_id: str) -> None:
        """Restart its container and wait until the queen hears the new process."""
        boot = self.hive_info(hive_id)["boot"]
        self.hives[hive_id].restart(timeout=STOP_LIMIT_S)

        def is_new(hive: dict[str, Any]) -> bool:
            return bool(hive["state"] == "online" and hive["boot"] != boot)

        self.until_hive(hive_id, is_new, f"{hive_id} is back")


def _kind(command: str) -> str:
    for kind in ("docker-init", "rbee_worker", "rbee-hive"):
        if kind in command:
            return kind
    return command


def by_hive(
    cluster: ContainerCluster, streams: Sequence[JobStream | ChatStream]
) -> dict[str, list[JobStream | ChatStream]]:
    """Sort streams by the hive on which they run."""
    found: dict[str, list[JobStream | ChatStream]] = {hive_id: [] for hive_id in HIVES}
    for asked in streams:
        found[cluster.hive_of(asked)].append(asked)
    return found


def tries(cluster: ContainerCluster) -> Iterator[None]:
    """Try again and again, and wait between as a client does, for as long as the cluster is there."""
    delay_s = 0.05
    while not cluster.is_closed.is_set():
        yield
        cluster.is_closed.wait(delay_s)
        delay_s = min(2 * delay_s, 1.0)
    raise AssertionError("the cluster is gone")
