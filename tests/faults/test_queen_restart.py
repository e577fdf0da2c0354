"""A queen that is killed and comes back goes on with its jobs; their readers get the exact rest."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from rbee_postgres import new_database, postgres_server
from rbee_processes import BIN, Cluster, Service, stream, text_of, until
from rbee_restarts import Reader, RestartableCluster, read_through_a_kill

pytestmark = pytest.mark.timeout(600)


def cluster_in(tmp_path: Path, *queen_args: str) -> RestartableCluster:
    return RestartableCluster(tmp_path, engine="sim", queen_args=queen_args)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_server() as url:
        yield url


def infer(tokens: int, **fields: Any) -> dict[str, Any]:
    return {
        "operation": "infer",
        "model": "m",
        "prompt": f"prompt {fields}",
        "max_tokens": tokens,
        "ignore_eos": True,
        "resume_window_s": 120,
    } | {key: value for key, value in fields.items() if key != "salt"}


def assert_whole(events: list[dict[str, Any]], ids: list[str], tokens: int) -> None:
    assert [e["index"] for e in events if e["action"] == "token"] == list(range(tokens))
    actions = [e["action"] for e in events if e["action"] != "token"]
    assert actions == [
        "execute",
        "infer_start",
        "infer_schedule",
        "infer_worker",
        "infer_complete",
        "execute_complete",
    ]
    assert len(set(ids)) == len(ids)
    counts = [tuple(map(int, event_id.split("-"))) for event_id in ids]
    assert counts == sorted(counts)


@pytest.mark.parametrize("down_s", [1.0, 10.0])
def test_kill_of_the_queen_during_20_streams(tmp_path: Path, down_s: float) -> None:
    """Every client ends with exactly the text the engine produced; none lost, none doubled."""
    streams, tokens = 20, 1500
    with cluster_in(tmp_path) as cluster:
        cluster.spawn("m", "--sim-step-ms", "4")
        readers = [Reader(cluster.queen.url, cluster.submit(infer(tokens, salt=i))) for i in range(streams)]
        read_through_a_kill(cluster, readers, down_s)

        for reader in readers:
            assert_whole(reader.events, reader.ids, tokens)
            # A new reader gets the same from the start, whoever had restarted meanwhile.
            with stream(cluster.queen.url, reader.job_id) as frames:
                again = list(frames)
            assert text_of([event for _, event in again]) == text_of(reader.events)
            assert [event_id for event_id, _ in again] == reader.ids
        hive_jobs = httpx.get(f"{cluster.hive.url}/v1/jobs?operation=infer&limit=100").json()["jobs"]
        assert len(hive_jobs) == streams, "a job was run twice"


def test_a_job_that_finishes_while_the_queen_is_down_is_told_to_its_reader(tmp_path: Path) -> None:
    with cluster_in(tmp_path) as cluster:
        cluster.spawn("m", "--sim-step-ms", "4")
        reader = Reader(cluster.queen.url, cluster.submit(infer(400)))
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(reader.read)
            until(lambda: len(reader.events) > 20, "the stream is under way")
            cluster.kill_queen()
            until(lambda: hive_state(cluster) == "completed", "the hive's job has completed")
            cluster.start_queen()
            result.result(300)

        assert_whole(reader.events, reader.ids, 400)


def test_kill_between_the_terminal_event_and_the_last_readers_last_byte(tmp_path: Path) -> None:
    with cluster_in(tmp_path) as cluster:
        cluster.spawn("m", "--sim-step-ms", "1")
        job_id = cluster.submit(infer(300), Prefer="respond-async")
        until(lambda: record(cluster, job_id)["state"] == "completed", "the job has completed")
        reader = Reader(cluster.queen.url, job_id)
        with stream(cluster.queen.url, job_id) as frames:
            for event_id, event in frames:
                reader.ids.append(event_id)
                reader.events.append(event)
                if len(reader.events) == 150:
                    break
        cluster.kill_queen()
        cluster.start_queen()
        reader.read()

        assert_whole(reader.events, reader.ids, 300)
        assert record(cluster, job_id)["state"] == "completed"


def test_history_keys_and_records_survive(tmp_path: Path) -> None:
    with cluster_in(tmp_path) as cluster:
        cluster.spawn("m")
        headers = {"Idempotency-Key": "order-1", "Prefer": "respond-async"}
        job_id = cluster.submit(infer(5), **headers)
        until(lambda: record(cluster, job_id)["state"] == "completed", "the job has completed")
        before = record(cluster, job_id)
        cluster.kill_queen()
        cluster.start_queen()

        assert {**record(cluster, job_id), "position": None} == {**before, "position": None}
        assert cluster.submit(infer(5), **headers) == job_id
        other = httpx.post(f"{cluster.queen.url}/v1/jobs", json=infer(6), headers=headers)
        assert other.status_code == 409
        listed = httpx.get(f"{cluster.queen.url}/v1/jobs?operation=infer").json()["jobs"]
        assert [job["job_id"] for job in listed] == [job_id]


def test_a_pending_job_still_starts_with_its_first_reader(tmp_path: Path) -> None:
    with cluster_in(tmp_path) as cluster:
        cluster.spawn("m")
        job_id = cluster.submit(infer(5))
        cluster.kill_queen()
        cluster.start_queen()
        # Who reads before the queen has heard her hives again is told that there is no worker.
        until(cluster._is_online, "the hive is online again")
        reader = Reader(cluster.queen.url, job_id).read()

        assert_whole(reader.events, reader.ids, 5)


def test_what_cannot_go_on_ends_with_job_lost(tmp_path: Path) -> None:
    """The hive was restarted too: it does not know the job any more, and the job had begun to speak."""
    soon_over = ["--drain-timeout-s", "1"]
    with RestartableCluster(tmp_path, engine="sim", hive_args=soon_over) as cluster:
        cluster.spawn("m", "--sim-step-ms", "20")
        reader = Reader(cluster.queen.url, cluster.submit(infer(2000)))
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(reader.read)
            until(lambda: len(reader.events) > 20, "the stream is under way")
            cluster.kill_queen()
            port = cluster.hive.url.rpartition(":")[2]
            cluster.hive.terminate()
            cluster.restart_hive(port)
            cluster.start_queen()
            result.result(300)

        assert reader.events[-1]["action"] == "execute_error"
        assert reader.events[-1]["code"] == "job_lost"


def test_the_prompt_is_erased_when_the_job_ends(tmp_path: Path) -> None:
    with cluster_in(tmp_path) as cluster:
        cluster.spawn("m")
        cluster.events({"operation": "infer", "model": "m", "prompt": "Heffalump zanzibar", "max_tokens": 3})
        cluster.queen.terminate()
        files = [path for path in (tmp_path / "q").rglob("*") if path.is_file()]

        assert any(path.suffix == ".db" for path in files)
        for path in files:
            assert b"Heffalump" not in path.read_bytes(), path
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_stopped_queen_leaves_its_jobs_running_and_takes_them_up_again(tmp_path: Path) -> None:
    with cluster_in(tmp_path) as cluster:
        cluster.spawn("m", "--sim-step-ms", "5")
        reader = Reader(cluster.queen.url, cluster.submit(infer(1500)))
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(reader.read)
            until(lambda: len(reader.events) > 20, "the stream is under way")
            cluster.queen.process.terminate()
            until(lambda: any(e.get("event") == "draining" for e in cluster.queen.log()), "the queen drains")
            assert cluster.queen.terminate() == 0  # a second signal cuts the draining
            cluster.start_queen()
            result.result(300)

        assert_whole(reader.events, reader.ids, 1500)


@pytest.mark.parametrize("named", [True, False], ids=["model", "only-model"])
def test_an_openai_job_goes_on_though_no_hive_has_been_heard_yet(tmp_path: Path, named: bool) -> None:
    """It had its place: which models the queen has heard of since her restart does not matter."""
    tokens = 400
    say = [{"role": "user", "content": "one two"}]
    body = {"messages": say, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    if named:
        body["model"] = "m"
    with cluster_in(tmp_path) as cluster:
        cluster.spawn("m", "--sim-step-ms", "10")
        operation = {"operation": "openai", "endpoint": "/v1/chat/completions", "body": body}
        job_id = cluster.submit(operation, Prefer="respond-async")
        reader = Reader(cluster.queen.url, job_id)
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(reader.read)
            until(lambda: len(reader.events) > 20, "the stream is under way")
            cluster.kill_queen()
            cluster.start_queen()
            result.result(300)
        with stream(cluster.queen.url, job_id) as frames:
            assert [event for _, event in frames] == reader.events
        assert len(record(cluster, job_id)["children"]) == 1

    chunks = [event["data"] for event in reader.events if event["action"] == "chunk"]
    words = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    numbers = [int(word.removeprefix(" tok")) for word in words if word]
    assert numbers == [(numbers[0] + place) % 1000 for place in range(tokens)]
    assert reader.events[-1]["action"] == "execute_complete", reader.events[-1]


def test_a_queen_on_postgresql_that_is_killed_goes_on_with_her_streams(tmp_path: Path, postgres: str) -> None:
    streams, tokens = 8, 1000
    with cluster_in(tmp_path, "--database", new_database(postgres)) as cluster:
        cluster.spawn("m", "--sim-step-ms", "4")
        readers = [Reader(cluster.queen.url, cluster.submit(infer(tokens, salt=i))) for i in range(streams)]
        read_through_a_kill(cluster, readers, down_s=1.0)

        for reader in readers:
            assert_whole(reader.events, reader.ids, tokens)
        hive_jobs = httpx.get(f"{cluster.hive.url}/v1/jobs?operation=infer&limit=100").json()["jobs"]
        assert len(hive_jobs) == streams, "a job was run twice"
        checked = cluster.run({"operation": "queen_check"})
        assert checked["findings"][0]["message"].startswith("PostgreSQL ")
        assert not list((tmp_path / "q").rglob("*.db"))


def test_a_second_queen_on_the_same_postgresql_is_refused_until_the_first_is_gone(
    tmp_path: Path, postgres: str
) -> None:
    """She is a standby for whoever starts her again; she takes over jobs, history and hives."""
    url = new_database(postgres)
    with cluster_in(tmp_path, "--database", url) as cluster:
        cluster.spawn("m", "--sim-step-ms", "10")
        job_id = cluster.submit(infer(1500))
        reader = Reader(cluster.queen.url, job_id)
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(reader.read)
            until(lambda: len(reader.events) > 20, "the stream is under way")
            refused = subprocess.run(
                [BIN / "rbee-queen", "--port", "0", "--database", url],
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert refused.returncode == 2
            assert "another queen uses it" in refused.stderr.splitlines()[-1]
            assert len(refused.stderr.splitlines()[-1]) < 300

            cluster.kill_queen()
            standby = Service(
                "rbee-queen", ["--port", "0", "--database", url], tmp_path / "s.log", cluster.marker
            )
            cluster.queen = standby
            reader.url = standby.url
            result.result(300)

        assert_whole(reader.events, reader.ids, 1500)
        assert record(cluster, job_id)["state"] == "completed"
        # Hives announce themselves to the address they were given; the stored ones are found all the same.
        until(cluster._is_online, "the new queen has found the hive")


def hive_state(cluster: Cluster) -> str:
    (job,) = httpx.get(f"{cluster.hive.url}/v1/jobs?operation=infer").json()["jobs"]
    return str(job["state"])


def record(cluster: Cluster, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{cluster.queen.url}/v1/jobs/{job_id}").json()
    return found
