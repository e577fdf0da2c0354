"""A queen and three hives in containers on a private network, and everything that can happen to one of them.

Clients sit outside. Each outcome is asserted at them: the exact text, one terminal event, `[DONE]`, the error
and its code. Nothing is lost but what the design allows: what had spoken on a hive that is gone.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import docker
import httpx
import pytest
from rbee_container_cluster import (
    HIVES,
    MUTE,
    READ_LIMIT_S,
    SILENT,
    STOP_LIMIT_S,
    TALK,
    WORKERS_EACH,
    ChatStream,
    ContainerCluster,
    JobStream,
    by_hive,
    tries,
)
from rbee_processes import until

pytestmark = pytest.mark.timeout(3600)
"""The first test of a run builds the images, or waits until other tests have built theirs."""

Start = Callable[..., ContainerCluster]

TOKENS = 1000
"""Of a stream that is to outlast what happens: 25 seconds."""

LONG = 2000
"""Of a stream that is to outlast two starts of the queen."""

ENDLESS = 30_000
"""Of a stream that is not to end by itself."""

UNREACHABLE = ("--hive-unreachable-after-s", "8")
"""More than a busy machine keeps a hive from speaking."""

TOLD = ["execute", "infer_start", "infer_schedule", "infer_worker", "infer_complete", "execute_complete"]
"""Besides the tokens, of an inference to which nothing has happened."""

NEW_HIVE = Counter({"docker-init": 1, "rbee-hive": 1})
"""The processes of a hive that has no worker."""


def lost_after(seconds: int) -> tuple[str, ...]:
    return (*UNREACHABLE, "--hive-lost-after-s", str(seconds))


@pytest.fixture
def start(engine: docker.DockerClient, image: Callable[[str], str], run_id: str) -> Iterator[Start]:
    """Start a cluster: `start(*queen_args, hive_environment=...)`."""
    with ExitStack() as stack:

        def start(*queen_args: str, **options: Any) -> ContainerCluster:
            return stack.enter_context(ContainerCluster(engine, image, run_id, *queen_args, **options))

        yield start


def ask_everywhere(cluster: ContainerCluster) -> list[JobStream | ChatStream]:
    """Have a job and a chat on every worker, so that streams run on all hives; give them."""
    count = len(HIVES) * WORKERS_EACH
    streams: list[JobStream | ChatStream] = [cluster.ask(TOKENS) for _ in range(count)]
    streams += [cluster.chat(TOKENS) for _ in range(count)]
    cluster.until_all_speak(streams)
    spread = by_hive(cluster, streams)
    assert [len(spread[hive_id]) for hive_id in HIVES] == [2 * WORKERS_EACH] * len(HIVES)
    return streams


def ask_in_silence(cluster: ContainerCluster, hive_id: str) -> list[JobStream]:
    """Have two requests on a worker that says nothing, and besides a worker elsewhere that would answer."""
    cluster.spawn(hive_id, MUTE, *SILENT)
    silent = [cluster.ask(50, MUTE) for _ in range(2)]
    until(lambda: all("infer_worker" in asked.narrated for asked in silent), "the worker has them", 60)
    cluster.spawn(next(each for each in HIVES if each != hive_id), MUTE)
    return silent


def check_run_elsewhere(cluster: ContainerCluster, silent: list[JobStream], hive_id: str) -> None:
    """What had not spoken was run again, once, on another hive; its client sees one answer."""
    for asked in silent:
        asked.until_end().check_whole()
        assert asked.narrated == [*TOLD[:4], "infer_retry", *TOLD[2:]]
        retry = next(event for event in asked.events if event["action"] == "infer_retry")["data"]
        assert (retry["from"]["hive_id"], retry["cause"]) == (hive_id, "hive_lost")
        assert retry["to"]["hive_id"] == asked.hive_id != hive_id
        record = cluster.record(asked.job_id)
        assert (record["state"], len(record["children"])) == ("completed", 2)


def check_answers(cluster: ContainerCluster, hive_id: str) -> None:
    """A request to this hive is answered."""
    asked = cluster.ask(5, hive_id=hive_id).until_end()
    asked.check_whole()
    assert asked.hive_id == hive_id


def test_a_hive_is_killed(start: Start) -> None:
    """F01, F02, F04, F36: what had spoken there ends with one error, what had not is run elsewhere.

    In a container the workers die with their hive. Started again, it is used again, and nothing is left.
    """
    cluster = start(*lost_after(25))
    silent = ask_in_silence(cluster, "h1")
    streams = ask_everywhere(cluster)
    spread = by_hive(cluster, streams)
    cluster.hives["h1"].kill("SIGKILL")
    cluster.until_state("h1", "unreachable")
    meanwhile = cluster.ask(5)

    meanwhile.until_end().check_whole()
    assert meanwhile.hive_id != "h1"
    for asked in streams:
        asked.until_end()
    for hive_id in ("h2", "h3"):
        for asked in spread[hive_id]:
            asked.check_whole()
            assert cluster.record(asked.job_id)["state"] == "completed"
    for asked in spread["h1"]:
        asked.check_failed("hive_lost")
        record = cluster.record(asked.job_id)
        assert (record["state"], record["error"]["code"]) == ("failed", "hive_lost")
    cluster.check_ran_once(streams)
    check_run_elsewhere(cluster, silent, "h1")

    cluster.until_state("h1", "lost")
    cluster.hives["h1"].start()
    cluster.until_state("h1", "online")
    left = cluster.workers("h1")
    assert [worker["state"] for worker in left] == ["failed"] * (WORKERS_EACH + 1)
    assert all(worker["cause"] for worker in left)
    assert cluster.processes("h1") == NEW_HIVE
    assert cluster.hive_jobs("h1") == []
    cluster.spawn("h1", TALK)
    assert cluster.processes("h1") == NEW_HIVE + Counter({"rbee_worker": 1})
    check_answers(cluster, "h1")


def test_a_hive_is_paused(start: Start) -> None:
    """F36: shorter than the grace nothing is lost; longer, and what ran there ends once and is no stray."""
    cluster = start(*lost_after(30))
    streams = ask_everywhere(cluster)
    spread = by_hive(cluster, streams)
    cluster.hives["h2"].pause()
    cluster.until_state("h2", "unreachable")
    elsewhere = cluster.ask(5).until_end()
    stalled = [asked.had for asked in spread["h2"]]
    refused = cluster.ask(5, hive_id="h2").until_end()
    assert [asked.had for asked in spread["h2"]] == stalled
    cluster.hives["h2"].unpause()
    cluster.until_state("h2", "online")

    elsewhere.check_whole()
    assert elsewhere.hive_id != "h2"
    assert refused.narrated == ["execute", "infer_start", "error", "execute_error"]
    assert (refused.error["code"], refused.error["retryable"]) == ("no_worker", True)
    assert "hive h2 is silent and gets nothing new until it answers" in refused.error["message"]
    for asked in streams:
        asked.until_end().check_whole()
    cluster.check_ran_once(streams)
    assert cluster.hive_job_states("h2") == Counter(completed=len(spread["h2"]))
    assert cluster.logged("queen", "stray_cancelled") == []

    silent = ask_in_silence(cluster, "h2")
    spoken = [cluster.ask(ENDLESS, hive_id="h2") for _ in range(3)]
    cluster.until_all_speak(spoken)
    cluster.hives["h2"].pause()
    for asked in spoken:
        asked.until_end().check_failed("hive_lost")
        record = cluster.record(asked.job_id)
        assert (record["state"], record["error"]["code"]) == ("failed", "hive_lost")
    cluster.check_ran_once(spoken)
    check_run_elsewhere(cluster, silent, "h2")
    cluster.until_state("h2", "lost")
    cluster.hives["h2"].unpause()
    check_healed(cluster, "h2", completed=len(spread["h2"]), cancelled=len([*spoken, *silent]))
    told = len([*spoken, *silent])
    until(lambda: len(cluster.logged("queen", "stray_cancelled")) == told, "each stray is told", 60)
    cluster.run({"operation": "hive_list"})
    assert len(cluster.logged("queen", "stray_cancelled")) == told, "one was told twice"


def check_healed(cluster: ContainerCluster, hive_id: str, **states: int) -> None:
    """A hive that was given up is back, runs nothing of before, and answers."""
    cluster.until_state(hive_id, "online")
    until(lambda: cluster.hive_job_states(hive_id) == Counter(states), f"no stray is left on {hive_id}", 60)
    cluster.until_idle(hive_id)
    check_answers(cluster, hive_id)


def test_a_hive_is_off_the_network_for_a_while(start: Start) -> None:
    """F37: back at its address its streams go on exactly; at another one they end, and no stray is left."""
    cluster = start(*lost_after(60))
    streams = ask_everywhere(cluster)
    spread = by_hive(cluster, streams)
    address = cluster.address("h3")
    cluster.disconnect("h3")
    cluster.until_state("h3", "unreachable")
    cluster.connect("h3", address)
    cluster.until_state("h3", "online")

    for asked in streams:
        asked.until_end().check_whole()
    cluster.check_ran_once(streams)
    assert cluster.hive_job_states("h3") == Counter(completed=len(spread["h3"]))

    silent = ask_in_silence(cluster, "h3")
    spoken = [cluster.ask(ENDLESS, hive_id="h3") for _ in range(3)]
    cluster.until_all_speak(spoken)
    cluster.disconnect("h3")
    cluster.until_state("h3", "unreachable")
    cluster.connect("h3", cluster.other_address())
    cluster.until_state("h3", "online")

    assert cluster.hive_info("h3")["url"] == f"http://{cluster.other_address()}:7835"
    for asked in spoken:
        asked.until_end().check_failed("hive_lost")
    cluster.check_ran_once(spoken)
    check_run_elsewhere(cluster, silent, "h3")
    check_healed(cluster, "h3", completed=len(spread["h3"]), cancelled=len([*spoken, *silent]))


def test_a_hive_is_off_the_network_for_long(start: Start) -> None:
    """F36, F37: its streams end with an error, it ends what nobody follows, and comes back clean."""
    cluster = start(*lost_after(15))
    silent = ask_in_silence(cluster, "h3")
    spoken = [cluster.ask(ENDLESS, hive_id="h3") for _ in range(3)]
    cluster.until_all_speak(spoken)
    address = cluster.address("h3")
    cluster.disconnect("h3")
    for asked in spoken:
        asked.until_end().check_failed("hive_lost")
    cluster.check_ran_once(spoken)
    check_run_elsewhere(cluster, silent, "h3")

    def all_ended() -> bool:
        ended = [line["reason"] for line in cluster.logged("h3", "job_cancelled")]
        return ended == ["owner_gone"] * len([*spoken, *silent])

    until(all_ended, "the hive has ended what nobody follows", 300)
    cluster.connect("h3", address)
    check_healed(cluster, "h3", cancelled=len([*spoken, *silent]))
    assert cluster.logged("queen", "stray_cancelled") == []


def test_the_queen_is_restarted_and_killed(start: Start) -> None:
    """F05: whoever reads a job gets exactly the rest; nothing is run again, and hives keep their workers."""
    cluster = start(*lost_after(30), "--drain-timeout-s", "1")
    workers = {hive_id: cluster.workers(hive_id) for hive_id in HIVES}
    jobs = [cluster.ask(LONG) for _ in range(len(HIVES) * WORKERS_EACH)]
    chats = [cluster.chat(ENDLESS) for _ in HIVES]
    operation = cluster.infer(LONG)
    headers = {"Idempotency-Key": "order-1", "Prefer": "respond-async"}
    job_id = cluster.submit(operation, **headers)
    jobs.append(cluster.follow(job_id, operation))
    cluster.until_all_speak([*jobs, *chats])
    assert {asked.hive_id for asked in jobs} == set(HIVES)

    cluster.queen.restart(timeout=STOP_LIMIT_S)
    cluster.until_queen_answers()
    had = [asked.had for asked in jobs]
    went_on = list(zip(jobs, had, strict=True))
    until(lambda: all(asked.done or asked.had > before for asked, before in went_on), "they go on", 60)
    assert cluster.submit(operation, **headers) == job_id
    cluster.queen.kill("SIGKILL")
    cluster.queen.wait()
    cluster.queen.start()
    cluster.until_queen_answers()
    assert cluster.submit(operation, **headers) == job_id

    for asked in jobs:
        asked.until_end().check_whole()
        assert asked.narrated == TOLD
        assert cluster.record(asked.job_id)["state"] == "completed"
    cluster.check_ran_once(jobs)
    # Such a stream cannot be taken up again: it breaks off, and who reads it sees that it is not whole.
    for chat in chats:
        chat.until_end()
        assert chat.is_cut
        assert chat.expected.startswith(chat.text)
        assert "[DONE]" not in chat.data
        until(lambda: cluster.record(chat.job_id)["state"] == "cancelled", "it is cancelled", 60)  # noqa: B023
    for hive_id in HIVES:
        cluster.until_state(hive_id, "online")
        cluster.until_idle(hive_id)
        pids = [(worker["worker_id"], worker["pid"]) for worker in cluster.workers(hive_id)]
        assert pids == [(worker["worker_id"], worker["pid"]) for worker in workers[hive_id]]
    ran = sum((cluster.hive_job_states(hive_id) for hive_id in HIVES), Counter[str]())
    assert ran == Counter(completed=len(jobs), cancelled=len(chats))


# --- a rolling restart under load ------------------------------------------------------------------------


class Load:
    """Clients that go on asking, one request after the other, until they are told to stop."""

    LENGTHS = (5, 100)
    """Tokens of short and of long requests, in turns."""

    CLIENTS = 3
    """Of each kind: jobs and chats."""

    def __init__(self, cluster: ContainerCluster) -> None:
        self._cluster = cluster
        self._is_over = threading.Event()
        self.jobs: list[JobStream] = []
        self.chats: list[ChatStream] = []
        self._clients = [
            cluster.beside(client)
            for client in [self._ask_jobs, self._ask_chats]
            for _ in range(self.CLIENTS)
        ]

    def finish(self) -> None:
        """Let each client end what it has begun."""
        self._is_over.set()
        for client in self._clients:
            client.result(READ_LIMIT_S)

    @property
    def streams(self) -> list[JobStream | ChatStream]:
        """All that was asked until now."""
        return [*self.jobs, *self.chats]

    def _ask_jobs(self) -> None:
        while True:
            for tokens in self.LENGTHS:
                if self._is_over.is_set():
                    return
                operation = self._cluster.infer(tokens)
                job_id = self._submit(operation)
                asked = JobStream(self._cluster, job_id, operation["prompt"], tokens)
                self.jobs.append(asked)
                asked.read()

    def _submit(self, operation: dict[str, Any]) -> str:
        """Submit until it is known that it has arrived; the key makes one job of it."""
        headers = self._cluster.auth | {"Idempotency-Key": operation["prompt"].replace(" ", "-")}
        for _ in tries(self._cluster):
            try:
                answer = httpx.post(
                    f"{self._cluster.url}/v1/jobs", json=operation, headers=headers, timeout=30
                )
            except httpx.TransportError:
                continue
            if answer.status_code != 503:
                assert answer.status_code == 200, answer.text
                return str(answer.json()["job_id"])
            assert answer.headers["Retry-After"]
        raise AssertionError

    def _ask_chats(self) -> None:
        while True:
            for tokens in self.LENGTHS:
                if self._is_over.is_set():
                    return
                asked = self._chat(tokens)
                self.chats.append(asked)

    def _chat(self, tokens: int) -> ChatStream:
        """Ask until it is taken, as the official clients do."""
        for _ in tries(self._cluster):
            asked = self._cluster.new_chat(tokens).read()
            if asked.status is not None and asked.status != 503:
                return asked
        raise AssertionError

    def until_more(self) -> None:
        """Wait until each client has begun another request."""
        asked = len(self.streams)
        until(lambda: len(self.streams) > asked + 2 * self.CLIENTS, "the load goes on", 120)


def test_all_are_restarted_one_by_one_and_drained_before(start: Start) -> None:
    """F06: with `hive drain` first not one request fails, though every hive and the queen are restarted."""
    cluster = start(*lost_after(30), "--drain-timeout-s", "60")
    load = Load(cluster)
    for hive_id in HIVES:
        load.until_more()
        drain = {"operation": "hive_drain", "hive_id": hive_id}
        until(lambda: cluster.run(drain)["running"] == 0, "it has finished what it had", 120)  # noqa: B023
        restart_empty(cluster, hive_id)
    load.until_more()
    cluster.queen.restart(timeout=STOP_LIMIT_S)
    cluster.until_queen_answers()
    load.until_more()
    load.finish()

    for asked in load.streams:
        asked.check_whole()
    check_records(cluster, load.streams)
    assert {job.hive_id for job in load.jobs} == set(HIVES)


def restart_empty(cluster: ContainerCluster, hive_id: str) -> None:
    """Restart a hive, which leaves no worker of before, and give it new ones."""
    cluster.restart_hive(hive_id)
    assert cluster.workers(hive_id) == []
    assert cluster.processes(hive_id) == NEW_HIVE
    cluster.spawn_talkers(hive_id)


def test_all_hives_are_restarted_one_by_one_without_draining(start: Start) -> None:
    """F06: what has spoken and does not end in time ends with one error that says why; all else is whole."""
    cluster = start(*lost_after(30), hive_environment={"RBEE_DRAIN_TIMEOUT_S": "1"})
    load = Load(cluster)
    cut: list[JobStream | ChatStream] = []
    for hive_id in HIVES:
        long_one = cluster.ask(ENDLESS, hive_id=hive_id)
        cut.append(long_one)
        cluster.until_all_speak([long_one])
        restart_empty(cluster, hive_id)
    load.finish()

    for asked in cut:
        asked.until_end()
    failed = [asked for asked in load.streams if asked.record_state == "failed"]
    for asked in [*cut, *failed]:
        asked.check_failed("shutting_down")
    cluster.check_ran_once([*cut, *failed])
    for asked in load.streams:
        if asked not in failed:
            asked.check_whole()
    check_records(cluster, [*load.streams, *cut])
    for hive_id in HIVES:
        check_answers(cluster, hive_id)


def check_records(cluster: ContainerCluster, streams: list[JobStream | ChatStream]) -> None:
    """What the queen's history says is what the clients saw, of each request and of no other."""
    found: dict[str, str] = {}
    for operation in ("infer", "openai"):
        cursor = ""
        while cursor is not None:
            page = cluster.get(f"/v1/jobs?operation={operation}&limit=1000{cursor and f'&cursor={cursor}'}")
            found |= {job["job_id"]: job["state"] for job in page["jobs"]}
            cursor = page["next_cursor"]
    assert found == {asked.job_id: asked.record_state for asked in streams}
