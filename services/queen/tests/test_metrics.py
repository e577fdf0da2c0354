"""What the queen tells of her fleet, her scheduling and her store; and where Prometheus finds the cluster."""

from typing import Any

import msgspec
import pytest
from prometheus_client.registry import Collector

from rbee_contracts.nodes import HiveHeartbeat, HiveInfo, WorkerInfo
from rbee_queen.fleet import Fleet, Hive
from rbee_queen.fleet.identity import Incarnation
from rbee_queen.inference import Inference
from rbee_queen.journal import StoreJournal
from rbee_queen.metrics.collector import QueenCollector, model_labels
from rbee_queen.metrics.measures import REASONS, SchedulingMeasures, StoreMeasures
from rbee_queen.metrics.targets import Target, targets
from rbee_queen.openai.aliases import Alias
from rbee_queen.retry import HIVE_FAILURES, WORKER_FAILURES
from rbee_queen.store.records import StoredHive
from rbee_queen.store.testing import MemoryStore

pytestmark = pytest.mark.anyio


def worker(worker_id: str = "w1", **fields: Any) -> WorkerInfo:
    told = {
        "worker_id": worker_id,
        "model": "m",
        "state": "ready",
        "pid": 2,
        "port": 9300,
        "running": 0,
        "waiting": 0,
        "kv_cache_usage": 0.0,
        "worker": "cpu",
        "devices": [0],
        "started_at": "",
    }
    return msgspec.convert(told | fields, WorkerInfo)


def hive(hive_id: str = "box1", url: str = "http://10.0.0.1:7835", **fields: Any) -> HiveInfo:
    return HiveInfo(hive_id=hive_id, url=url, version="1", **({"state": "online"} | fields))


def samples_of(collector: Collector) -> dict[str, float]:
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


# --- targets -------------------------------------------------------------------------------------------


def target(address: str, path: str = "/metrics", scheme: str = "http", **labels: str) -> Target:
    return Target(targets=[address], labels={"__scheme__": scheme, "__metrics_path__": path} | labels)


def test_a_queen_alone_is_a_target() -> None:
    assert targets("queen.example:7833", []) == [target("queen.example:7833", service="queen")]


def test_hives_and_workers_are_found_where_the_queen_reaches_them() -> None:
    hives = [
        hive("box1", workers=[worker("w1"), worker("w2", model="org/n@main")]),
        hive("box2", "https://box2.example:7835"),
        hive("box3", "http://[fd00::3]:7835"),
    ]

    assert targets("q:1", hives)[1:] == [
        target("10.0.0.1:7835", service="hive", hive="box1"),
        target(
            "10.0.0.1:7835", "/v1/workers/w1/metrics", service="worker", hive="box1", worker="w1", model="m"
        ),
        target(
            "10.0.0.1:7835",
            "/v1/workers/w2/metrics",
            service="worker",
            hive="box1",
            worker="w2",
            model="org/n@main",
        ),
        target("box2.example:7835", scheme="https", service="hive", hive="box2"),
        target("[fd00::3]:7835", service="hive", hive="box3"),
    ]


@pytest.mark.parametrize("state", ["connecting", "online", "unreachable", "lost"])
def test_a_hive_that_was_given_up_is_no_target(state: str) -> None:
    found = targets("q:1", [hive(state=state, workers=[worker()])])

    assert len(found) == (1 if state == "lost" else 3)


@pytest.mark.parametrize(
    ("state", "answers"),
    [
        ("starting", False),
        ("ready", True),
        ("busy", True),
        ("sleeping", True),
        ("draining", True),
        ("stopping", False),
        ("stopped", False),
        ("failed", False),
    ],
)
def test_a_worker_is_a_target_while_it_answers(state: str, answers: bool) -> None:
    assert (len(targets("q:1", [hive(workers=[worker(state=state)])])) == 3) is answers


def test_no_hive_can_name_a_worker_that_leads_elsewhere() -> None:
    """F50: what becomes a path is checked as the heartbeat is read."""
    beat = {"hive_id": "box1", "boot": "b", "version": "1", "timestamp": "", "devices": [], "models": []}
    for hostile in ("../../v1/jobs?x=", "w/../..", "w\n", "", "w%2f..", "http://elsewhere/"):
        told = msgspec.json.encode(
            beat | {"workers": [msgspec.to_builtins(worker()) | {"worker_id": hostile}]}
        )

        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(told, type=HiveHeartbeat)


# --- the collector ---------------------------------------------------------------------------------------


async def test_the_fleet_is_told_as_it_is() -> None:
    now = 100.0
    fleet = Fleet(lambda: now)
    for hive_id in ("box1", "box2"):
        fleet.restore(StoredHive(hive_id=hive_id, url="http://10.0.0.1:7835", boot="b"))
    inference = Inference(fleet, lambda: now)
    journal = StoreJournal(MemoryStore(), keep_s=1, keep_jobs=1)
    collector = QueenCollector(fleet, inference, journal, lambda: now)
    before = samples_of(collector)

    assert before["rbee_hives state=connecting"] == 2
    assert before["rbee_hives state=lost"] == 0
    assert "rbee_relay_silence_seconds peer=box1" not in before
    now = 200.0
    fleet.tick()
    fleet.get("box1").client.heard_at = 190.0
    after = samples_of(collector)

    assert after["rbee_hives state=unreachable"] + after["rbee_hives state=connecting"] == 2
    assert after["rbee_relay_silence_seconds peer=box1"] == 10
    assert after["rbee_relay_connected peer=box1"] == 0
    assert after["rbee_inference_retry_budget"] == 100
    assert after["rbee_store_backlog_records"] == 0
    journal.hive_seen("box1", "http://10.0.0.1:7835", "c")
    assert samples_of(collector)["rbee_store_backlog_records"] == 1


def test_reasons_and_codes_are_there_before_they_happen_and_no_others_come() -> None:
    measures = SchedulingMeasures()
    measures.retried("hive_lost")
    measures.retried("made_up")
    measures.refused("budget")
    measures.decided(is_placed=True)
    measures.decided(is_placed=False)
    measures.waited(0.002)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in measures.collect()
        for sample in family.samples
    }

    codes = {labels[1] for labels in found if labels[0] == "rbee_inference_retries_total"}
    assert codes == HIVE_FAILURES | WORKER_FAILURES | {"other"}
    assert {labels[1] for labels in found if labels[0] == "rbee_inference_retries_refused_total"} == set(
        REASONS
    )
    assert (
        found["rbee_inference_retries_total", "hive_lost"]
        == found["rbee_inference_retries_total", "other"]
        == 1
    )
    assert (
        found["rbee_schedule_decisions_total", "placed"]
        == found["rbee_schedule_decisions_total", "no_worker"]
        == 1
    )


def test_a_commit_is_observed_with_its_records() -> None:
    measures = StoreMeasures()
    measures.committed(3, 0.01)
    found = {sample.name: sample.value for family in measures.collect() for sample in family.samples}

    assert found["rbee_store_records_total"] == 3
    assert found["rbee_store_commit_seconds_count"] == 1


async def test_an_alias_has_the_label_of_its_model_while_that_is_loaded() -> None:
    known = Hive("box1", Incarnation("http://10.0.0.1:7835", "b"), "1", 0.0, None)
    known.heartbeat = HiveHeartbeat(
        hive_id="box1", boot="b", version="1", timestamp="", devices=[], models=[], workers=[worker()]
    )
    aliases = [Alias("nick", "m"), Alias("other", "not-loaded")]

    assert model_labels([known], aliases) == {"m": "m", "nick": "m"}
