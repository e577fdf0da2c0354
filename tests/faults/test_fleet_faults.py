"""Hives that fall silent, die, come back, or claim each other's id. Real processes, the sim engine."""

import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from rbee_many_hives import FakeHive, fake_hives
from rbee_processes import BIN, Service, is_alive, text_of, until
from rbee_restarts import BackgroundReader, FleetCluster

pytestmark = pytest.mark.timeout(900)

SOON_LOST = ("--hive-unreachable-after-s", "8", "--hive-lost-after-s", "16")
"""A queen who gives hives up earlier than is wise, for tests that wait for it."""

SILENT = ("--sim-step-ms", "3600000")
"""A worker that takes a request and says nothing."""


def infer(tokens: int = 10, **fields: Any) -> dict[str, Any]:
    return {
        "operation": "infer",
        "model": "m",
        "prompt": "one two three",
        "max_tokens": tokens,
        "ignore_eos": True,
        "resume_window_s": 120,
    } | fields


def narrated(events: list[dict[str, Any]]) -> list[str]:
    return [event["action"] for event in events if event["action"] != "token"]


def outcomes(hive: Service) -> list[str]:
    """What a hive was told when it announced itself."""
    return [str(line["outcome"]) for line in hive.log() if line.get("event") == "queen_announced"]


def logged(cluster: FleetCluster, event: str) -> list[dict[str, Any]]:
    """What the queen that runs now has logged of one kind."""
    return [line for line in cluster.queen.log() if line.get("event") == event]


def until_given(cluster: FleetCluster, worker: dict[str, Any]) -> None:
    """Wait until a worker has a request: its hive says so before it gives it."""
    get = {"operation": "worker_get", "worker_id": worker["worker_id"]}

    def has_one() -> bool:
        told = cluster.run(get, cluster.hive.url)
        return bool(told["running"] + told["waiting"])

    until(has_one, "the worker has the request")


def hive_job_states(url: str, **headers: str) -> list[str]:
    jobs = httpx.get(f"{url}/v1/jobs?operation=infer", headers=headers).json()["jobs"]
    return [job["state"] for job in jobs]


def until_answered(cluster: FleetCluster, operation: dict[str, Any]) -> None:
    """Wait until an inference is answered; till then it may fail only with what is worth another try."""

    def is_answered() -> bool:
        events = cluster.events(operation)
        if events[-1]["action"] == "execute_complete":
            assert len(text_of(events).split()) == operation["max_tokens"]
            return True
        assert events[-2]["retryable"], events[-2]
        return False

    until(is_answered, "it is answered")


def heartbeat_states(cluster: FleetCluster) -> list[str]:
    """Give the states of the hives in the queen's newest heartbeat."""
    with httpx.stream("GET", f"{cluster.queen.url}/v1/heartbeats/stream") as response:
        data = next(line for line in response.iter_lines() if line.startswith("data: "))
    return [hive["state"] for hive in json.loads(data.removeprefix("data: "))["hives"]]


def test_two_hives_with_one_id(tmp_path: Path) -> None:
    """F38: the second is refused; when the first falls silent the second takes its id and it is fenced."""
    with FleetCluster(tmp_path) as cluster:
        first = cluster.hive
        second = cluster.add_hive("box1", name="second")
        until(lambda: any("already there" in told for told in outcomes(second)), "the second is refused")
        assert cluster.hive_info("box1")["url"] == first.url

        first.process.send_signal(signal.SIGSTOP)
        until(lambda: cluster.hive_info("box1")["url"] == second.url, "the second has the id", 120)
        cluster.until_state("box1", "online")
        first.process.send_signal(signal.SIGCONT)
        until(lambda: any("has taken its id" in told for told in outcomes(first)), "the first is told", 120)

        assert cluster.hive_info("box1")["url"] == second.url
        spawned = cluster.spawn_on("box1")
        assert [w["worker_id"] for w in cluster.run({"operation": "worker_list"}, second.url)["workers"]] == [
            spawned["worker_id"]
        ]
        assert cluster.run({"operation": "worker_list"}, first.url)["workers"] == []
        assert len(text_of(cluster.events(infer(5))).split()) == 5


def test_a_hive_that_stands_still_for_a_while_loses_nothing(tmp_path: Path) -> None:
    """F36: silent and shorter than the grace: no new work, nothing ended, and it comes back by itself."""
    with FleetCluster(tmp_path) as cluster:
        cluster.spawn("m", "--sim-step-ms", "5")
        job_id = cluster.submit(infer(1500))
        with BackgroundReader(cluster.queen.url, job_id) as reader:
            reader.until_tokens(20)
            cluster.hive.process.send_signal(signal.SIGSTOP)
            try:
                cluster.until_state("box1", "unreachable")
                refused = cluster.events(infer())
                until(lambda: heartbeat_states(cluster) == ["unreachable"], "the queen's heartbeats tell it")
            finally:
                cluster.hive.process.send_signal(signal.SIGCONT)
            events = reader.until_end()
            cluster.until_state("box1", "online")

        error = next(event for event in refused if event["action"] == "error")
        assert error["code"] == "no_worker"
        assert "hive box1 is silent and gets nothing new until it answers" in error["message"]
        assert [event["index"] for event in reader.tokens] == list(range(1500))
        assert narrated(events)[-2:] == ["infer_complete", "execute_complete"]


def test_a_hive_that_is_lost_ends_its_jobs_and_what_it_still_runs_is_stopped_when_it_is_back(
    tmp_path: Path,
) -> None:
    """F36: longer than the grace: the job fails once, and the stray is cancelled on return."""
    with FleetCluster(tmp_path, *SOON_LOST) as cluster:
        worker = cluster.spawn("m", "--sim-step-ms", "20")
        job_id = cluster.submit(infer(30_000))
        with BackgroundReader(cluster.queen.url, job_id) as reader:
            reader.until_tokens(20)
            cluster.hive.process.send_signal(signal.SIGSTOP)
            try:
                events = reader.until_end()
                cluster.until_state("box1", "lost")
            finally:
                cluster.hive.process.send_signal(signal.SIGCONT)
        cluster.until_state("box1", "online")
        until(lambda: hive_job_states(cluster.hive.url) == ["cancelled"], "the stray is cancelled", 120)

        assert narrated(events)[-2:] == ["error", "execute_error"]
        assert (events[-2]["code"], events[-2]["retryable"]) == ("hive_lost", False)
        until(lambda: len(logged(cluster, "stray_cancelled")) == 1, "the queen has noted it")
        idle = {"operation": "worker_get", "worker_id": worker["worker_id"]}
        until(lambda: cluster.run(idle, cluster.hive.url)["running"] == 0, "the engine is free")


def test_a_worker_killed_before_its_first_token_is_replaced_by_another(tmp_path: Path) -> None:
    """F02: one retry, under the same job id; the client sees no second start."""
    with FleetCluster(tmp_path) as cluster:
        doomed = cluster.spawn("m", *SILENT)
        job_id = cluster.submit(infer(20))
        with BackgroundReader(cluster.queen.url, job_id) as reader:
            until_given(cluster, doomed)
            other = cluster.spawn("m")
            os.kill(doomed["pid"], signal.SIGKILL)
            events = reader.until_end()

        assert narrated(events) == [
            "execute",
            "infer_start",
            "infer_schedule",
            "infer_worker",
            "infer_retry",
            "infer_schedule",
            "infer_worker",
            "infer_complete",
            "execute_complete",
        ]
        retry = next(event for event in events if event["action"] == "infer_retry")["data"]
        assert retry["cause"] == "worker_lost"
        assert [retry[end]["worker_id"] for end in ("from", "to")] == [
            doomed["worker_id"],
            other["worker_id"],
        ]
        assert [event["index"] for event in reader.tokens] == list(range(20))
        record = httpx.get(f"{cluster.queen.url}/v1/jobs/{job_id}").json()
        assert len(record["children"]) == 2


def test_a_worker_killed_before_its_first_token_without_another_one_fails_and_may_be_sent_again(
    tmp_path: Path,
) -> None:
    with FleetCluster(tmp_path) as cluster:
        doomed = cluster.spawn("m", *SILENT)
        with BackgroundReader(cluster.queen.url, cluster.submit(infer())) as reader:
            until_given(cluster, doomed)
            os.kill(doomed["pid"], signal.SIGKILL)
            events = reader.until_end()

        assert (events[-2]["code"], events[-2]["retryable"]) == ("worker_lost", True)
        assert "No other worker can take it" in events[-2]["message"]


def test_a_hive_killed_before_the_first_token_is_replaced_by_another_that_has_the_model(
    tmp_path: Path,
) -> None:
    """F02, F36."""
    with FleetCluster(tmp_path, *SOON_LOST) as cluster:
        silent = cluster.spawn("m", *SILENT)
        with BackgroundReader(cluster.queen.url, cluster.submit(infer(20))) as reader:
            until_given(cluster, silent)
            until(lambda: "infer_worker" in narrated(list(reader.events)), "the queen has told where it is")
            cluster.add_hive("box2")
            cluster.until_state("box2", "online")
            cluster.spawn_on("box2")
            cluster.hive.kill()
            events = reader.until_end()
        # Nobody is left to stop it.
        os.kill(silent["pid"], signal.SIGKILL)

        retry = next(event for event in events if event["action"] == "infer_retry")["data"]
        assert (retry["from"]["hive_id"], retry["to"]["hive_id"]) == ("box1", "box2")
        assert retry["cause"] == "hive_lost"
        assert narrated(events).count("infer_start") == 1
        assert events[-1]["action"] == "execute_complete"
        assert [event["index"] for event in reader.tokens] == list(range(20))


def test_a_hive_that_has_forgotten_a_silent_request_is_asked_again_and_then_another_hive(
    tmp_path: Path,
) -> None:
    """Hive and worker are killed and the hive is back at once; nothing was said, so nothing is lost."""
    with FleetCluster(tmp_path) as cluster:
        silent = cluster.spawn("m", *SILENT)
        with BackgroundReader(cluster.queen.url, cluster.submit(infer(20))) as reader:
            until_given(cluster, silent)
            until(lambda: "infer_worker" in narrated(list(reader.events)), "the queen has told where it is")
            cluster.add_hive("box2")
            cluster.until_state("box2", "online")
            cluster.spawn_on("box2")
            cluster.hive.kill()
            os.kill(silent["pid"], signal.SIGKILL)
            until(lambda: not is_alive(silent["pid"]), "the worker has ended")
            cluster.restart_hive(cluster.hive.url.rpartition(":")[2])
            events = reader.until_end()

        assert narrated(events)[3:] == [
            "infer_worker",
            "warning",
            "infer_retry",
            "infer_schedule",
            "infer_worker",
            "infer_complete",
            "execute_complete",
        ]
        assert "had forgotten this job before it said anything" in events[4]["message"]
        retry = next(event for event in events if event["action"] == "infer_retry")["data"]
        assert (retry["from"]["hive_id"], retry["to"]["hive_id"]) == ("box1", "box2")
        assert [event["index"] for event in reader.tokens] == list(range(20))


def test_a_restarted_queen_finds_her_hives_by_herself(tmp_path: Path) -> None:
    """F05: she knows them from her store; the hive of this test never announces itself."""
    with FleetCluster(tmp_path) as cluster:
        quiet = cluster.add_hive("quiet", "--queen-url", "none")
        announcement = {
            "hive_id": "quiet",
            "boot": "unknown",
            "started_at": "2026-01-01T00:00:00Z",
            "version": "0",
            "port": int(quiet.url.rpartition(":")[2]),
        }
        httpx.post(f"{cluster.queen.url}/v1/hive/ready", json=announcement).raise_for_status()
        cluster.until_state("quiet", "online")
        spawned = cluster.spawn_on("quiet")
        boot = cluster.hive_info("quiet")["boot"]
        assert boot != "unknown", "the boot is what the hive itself tells"
        cluster.kill_queen()
        cluster.start_queen()
        cluster.until_state("quiet", "online")
        cluster.until_state("box1", "online")

        info = cluster.hive_info("quiet")
        assert (info["boot"], [w["worker_id"] for w in info["workers"]]) == (boot, [spawned["worker_id"]])
        assert not [line for line in logged(cluster, "hive_announced") if line["hive_id"] == "quiet"]
        until_answered(cluster, infer(5, hive_id="quiet"))


def test_a_hundred_hives_that_start_together(tmp_path: Path) -> None:
    """F40: each is followed once however often it announces itself, also by a queen that was restarted."""
    hives = [FakeHive(f"fake{number}") for number in range(100)]
    with FleetCluster(tmp_path) as cluster, fake_hives(*hives):
        cluster.spawn("m")

        def announce(hive: FakeHive) -> None:
            client.post("/v1/hive/ready", json=hive.announcement).raise_for_status()

        def are_online() -> bool:
            known = cluster.run({"operation": "hive_list"})["hives"]
            return len(known) == 101 and all(hive["state"] == "online" for hive in known)

        # Each on a connection of its own: one that has been idle may just be closed by the queen.
        once = httpx.Limits(max_keepalive_connections=0)
        with (
            httpx.Client(base_url=cluster.queen.url, timeout=90, limits=once) as client,
            ThreadPoolExecutor(20) as pool,
        ):
            list(pool.map(announce, hives * 3))
        until(are_online, "all are online", 120)
        until(lambda: {hive.followers for hive in hives} == {1}, "each is followed once")
        until_answered(cluster, infer(5))

        cluster.kill_queen()
        cluster.start_queen()
        until(are_online, "all are online again", 120)
        until(lambda: {hive.followers for hive in hives} == {1}, "each is followed once")
        until_answered(cluster, infer(5))


def test_a_hive_that_sends_the_queen_elsewhere_is_not_followed_there(tmp_path: Path) -> None:
    """F50: no redirects; another hive's answer is never taken for this one's."""
    elsewhere = FakeHive("fake")
    with FleetCluster(tmp_path) as cluster, fake_hives(elsewhere):
        liar = FakeHive("fake", redirect=f"http://127.0.0.1:{elsewhere.port}")
        impostor = FakeHive("other")
        with fake_hives(liar, impostor):
            ready = f"{cluster.queen.url}/v1/hive/ready"
            httpx.post(ready, json=liar.announcement).raise_for_status()
            httpx.post(ready, json=impostor.announcement | {"hive_id": "mine"}).raise_for_status()
            cluster.until_state("fake", "unreachable")
            cluster.until_state("mine", "unreachable")

            until(lambda: len(liar.requests) > 3, "it is asked again and again")
            assert elsewhere.requests == []
            told = [line["reason"] for line in logged(cluster, "hive_heartbeats_lost")]
            assert any("hive 'other' answers now, not 'mine'" in reason for reason in told)


def test_an_address_that_no_hive_has_is_refused(tmp_path: Path) -> None:
    """F50."""
    with FleetCluster(tmp_path) as cluster:
        for url in ("http://169.254.169.254:80", "http://10.0.0.9:7835", "http://user@127.0.0.1:7835"):
            announcement = FakeHive("fake").announcement | {"port": 7835, "hive_url": url}
            answer = httpx.post(f"{cluster.queen.url}/v1/hive/ready", json=announcement)
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_hive_url"), url
        assert not cluster.hive_info("fake")


# --- a cable that is cut -------------------------------------------------------------------------------


class FarHive:
    """A queen here, and a hive in a network namespace with a cable between them."""

    def __init__(self, cluster: FleetCluster, hive: Service, cable: str, url: str) -> None:
        self.cluster = cluster
        self.hive = hive
        self.url = url
        self._cable = cable

    def cut(self) -> None:
        run(f"ip link set {self._cable} down")

    def mend(self) -> None:
        run(f"ip link set {self._cable} up")


def run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command}: {done.stderr.strip()}")


@contextmanager
def far_hive(folder: Path, *queen_args: str) -> Iterator[FarHive]:
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux and the command `ip`")
    there, cable = f"rbeef{os.getpid()}", f"rbf{os.getpid()}"
    # Of 198.18.0.0/15, which is for such tests, four addresses that no other run on this machine has.
    net = ipaddress.ip_address("198.18.0.0") + 4 * (os.getpid() % 2**15)
    here, far = net + 1, net + 2
    run(f"ip netns add {there}")
    try:
        for command in [
            f"ip link add {cable} type veth peer name far netns {there}",
            f"ip addr add {here}/30 dev {cable}",
            f"ip link set {cable} up",
            f"ip -n {there} addr add {far}/30 dev far",
            f"ip -n {there} link set far up",
            f"ip -n {there} link set lo up",
        ]:
            run(command)
        token = "far-hive-far-hive-far-hive"
        with FleetCluster(folder, "--host", "0.0.0.0", *queen_args, token=token) as cluster:
            port = cluster.queen.url.rpartition(":")[2]
            argv = ["netns", "exec", there, str(BIN / "rbee-hive"), "--port", "0", "--hive-id", "far"]
            argv += ["--host", str(far), "--models-dir", str(folder), "--state-dir", str(folder / "far")]
            argv += ["--worker-engine", "sim", "--queen-url", f"http://{here}:{port}"]
            program = str(shutil.which("ip"))
            hive = Service(program, argv, folder / "far.log", cluster.marker, token)
            cluster.others.append(hive)
            cluster.until_state("far", "online")
            url = f"http://{far}:{hive.url.rpartition(':')[2]}"
            assert cluster.hive_info("far")["url"] == url
            yield FarHive(cluster, hive, cable, url)
    finally:
        subprocess.run(["ip", "link", "del", cable], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", there], check=False, capture_output=True)


def test_a_cable_that_is_cut_for_a_while_loses_nothing_of_an_open_stream(tmp_path: Path) -> None:
    """F37: the stream goes on where it stood, exactly, once the cable is mended."""
    with far_hive(tmp_path) as far:
        far.cluster.spawn_on("far", "--sim-step-ms", "10")
        job_id = far.cluster.submit(infer(1500))
        with BackgroundReader(far.cluster.queen.url, job_id, **far.cluster.auth) as reader:
            reader.until_tokens(50)
            far.cut()
            try:
                far.cluster.until_state("far", "unreachable")
            finally:
                far.mend()
            far.cluster.until_state("far", "online")
            events = reader.until_end()

        assert [event["index"] for event in reader.tokens] == list(range(1500))
        assert narrated(events)[-2:] == ["infer_complete", "execute_complete"]
        assert hive_job_states(far.url, **far.cluster.auth) == ["completed"]


def test_a_cable_that_is_cut_for_long_ends_the_stream_and_what_ran_there_when_it_is_mended(
    tmp_path: Path,
) -> None:
    """F36, F37: an error to the client, a stray stopped on return, no double run."""
    with far_hive(tmp_path, *SOON_LOST) as far:
        far.cluster.spawn_on("far", "--sim-step-ms", "20")
        job_id = far.cluster.submit(infer(30_000))
        with BackgroundReader(far.cluster.queen.url, job_id, **far.cluster.auth) as reader:
            reader.until_tokens(20)
            far.cut()
            try:
                events = reader.until_end()
            finally:
                far.mend()
        far.cluster.until_state("far", "online")
        until(lambda: hive_job_states(far.url, **far.cluster.auth) == ["cancelled"], "no stray is left", 180)

        assert (events[-2]["action"], events[-2]["code"]) == ("error", "hive_lost")
        until_answered(far.cluster, infer(5))
