"""Prometheus itself finds a whole cluster by its queen, and every rule and every panel has its data."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rbee_processes import Cluster, until
from rbee_prometheus import (
    DEPLOY,
    MISSING,
    PATIENCE_S,
    Prometheus,
    configure,
    dashboard_queries,
    promtool,
    running,
)

from rbee_hive.metrics import HIVE_METRICS
from rbee_job_server.metrics import (
    FIREHOSE_METRICS,
    JOB_METRICS,
    RELAY_METRICS,
    REQUEST_METRICS,
    SERVICE_METRICS,
)
from rbee_queen.metrics.collector import QUEEN_METRICS

EVERYWHERE = (*SERVICE_METRICS, *REQUEST_METRICS, *JOB_METRICS, *FIREHOSE_METRICS)
TOLD_BY = {
    "queen": (*EVERYWHERE, *RELAY_METRICS, *QUEEN_METRICS),
    "hive": (*EVERYWHERE, *RELAY_METRICS, *HIVE_METRICS),
    "worker": EVERYWHERE,
}
"""What the tables of the documentation say of each service."""

TOKEN = "a-token-for-the-tests-0123456789abcdef"
MODEL = "rbee-tiny"

NOT_HERE = {
    "Between two tokens, as vLLM measures it": "the simulated engine does not measure it",
    "Temperature of devices": "no GPU",
    "Power of devices": "no GPU",
}
"""Panels that have no data on this cluster, and why. Tests of vLLM and of devices look at these."""

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(MISSING), reason=f"Debian's package prometheus is not installed: no {', '.join(MISSING)}"
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("observed"), engine="sim", token=TOKEN) as cluster:
        cluster.spawn(MODEL)
        yield cluster


@pytest.fixture(scope="module")
def config(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return configure(tmp_path_factory.mktemp("prometheus"), cluster.queen.url, TOKEN)


@pytest.fixture(scope="module")
def prometheus(config: Path) -> Iterator[Prometheus]:
    with running(config) as prometheus:
        yield prometheus


def worker_id(cluster: Cluster) -> str:
    workers = cluster.run({"operation": "worker_list", "hive_id": cluster.hive_id})["workers"]
    return str(workers[0]["worker_id"])


def load(cluster: Cluster) -> None:
    """Some work of each kind: an answer, a streamed chat, a failure, a cancelled job, a place that is not."""
    queen = cluster.queen.url
    infer = {"operation": "infer", "model": MODEL, "prompt": "Hello", "max_tokens": 8}
    assert cluster.events(infer)[-1]["action"] == "execute_complete"
    assert cluster.events(infer | {"model": "nobody-has-this"})[-1]["action"] == "execute_error"
    cancelled = cluster.submit(infer, Prefer="respond-async")
    httpx.delete(f"{queen}/v1/jobs/{cancelled}", headers=cluster.auth)
    chat = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
    assert httpx.post(f"{queen}/v1/chat/completions", json=chat, headers=cluster.auth).status_code == 200


def scraped(cluster: Cluster) -> dict[str, str]:
    """What each service tells at a scrape."""
    urls = {
        "queen": f"{cluster.queen.url}/metrics",
        "hive": f"{cluster.hive.url}/metrics",
        "worker": f"{cluster.hive.url}/v1/workers/{worker_id(cluster)}/metrics",
    }
    answers = {service: httpx.get(url, headers=cluster.auth) for service, url in urls.items()}
    assert {answer.status_code for answer in answers.values()} == {200}
    return {service: answer.text for service, answer in answers.items()}


# --- the files -----------------------------------------------------------------------------------------


def test_promtool_takes_configuration_and_rules(config: Path) -> None:
    done = promtool("check", "config", str(config))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout


def test_the_alerts_fire_when_they_should() -> None:
    done = promtool("test", "rules", "rules_test.yml", cwd=DEPLOY)

    assert done.returncode == 0, done.stdout + done.stderr
    alerts = set(re.findall(r"alert: (\w+)", (DEPLOY / "rules.yml").read_text()))
    assert set(re.findall(r"name: (\w+)", (DEPLOY / "rules_test.yml").read_text())) == alerts


# --- what is scraped -----------------------------------------------------------------------------------


def test_promtool_finds_nothing_wrong_with_what_the_services_tell(cluster: Cluster) -> None:
    """But for vLLM's own names, which are not ours to choose."""
    load(cluster)
    for service, text in scraped(cluster).items():
        own = "".join(line for line in text.splitlines(keepends=True) if "vllm:" not in line)

        done = promtool("check", "metrics", stdin=own)

        assert (service, done.returncode, done.stderr) == (service, 0, "")


@pytest.mark.parametrize("service", sorted(TOLD_BY))
def test_a_service_tells_what_the_documentation_says_and_no_more(cluster: Cluster, service: str) -> None:
    load(cluster)
    types, labels = {}, {}
    for family in text_string_to_metric_families(scraped(cluster)[service]):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if name.startswith("rbee_"):
            types[name] = family.type
            found = {label for sample in family.samples for label in sample.labels}
            labels[name] = found - {"le"} if family.samples else None

    assert types == {metric.name: metric.kind for metric in TOLD_BY[service]}
    declared = {metric.name: set(metric.labels) for metric in TOLD_BY[service]}
    assert {name: found for name, found in labels.items() if found not in (None, declared[name])} == {}


def test_all_services_are_found_and_answer(cluster: Cluster, prometheus: Prometheus) -> None:
    def up() -> list[dict[str, Any]] | None:
        targets = prometheus.targets()
        return targets if len(targets) == 3 and all(t["health"] == "up" for t in targets) else None

    targets = until(up, "three targets are up", PATIENCE_S)

    labels = {target["labels"]["service"]: target["labels"] for target in targets}
    assert labels["hive"]["hive"] == labels["worker"]["hive"] == cluster.hive_id
    assert (labels["worker"]["worker"], labels["worker"]["model"]) == (worker_id(cluster), MODEL)
    assert {label["job"] for label in labels.values()} == {"rbee"}


def test_every_rule_is_evaluated(prometheus: Prometheus) -> None:
    def evaluated() -> list[dict[str, Any]] | None:
        rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
        return rules if rules and all(rule["health"] != "unknown" for rule in rules) else None

    rules = until(evaluated, "every rule was evaluated", PATIENCE_S)

    assert {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"} == {}
    assert len(rules) == (DEPLOY / "rules.yml").read_text().count("- alert:")


def test_every_panel_of_the_dashboard_has_data(cluster: Cluster, prometheus: Prometheus) -> None:
    pending = dashboard_queries()
    assert len(pending) > 50
    assert set(NOT_HERE) <= {panel for panel, _ in pending}

    def is_told(expression: str) -> bool:
        samples = prometheus.query(expression)  # which fails where the expression is none
        return any(not math.isnan(float(sample["value"][1])) for sample in samples)

    def have_data() -> bool:
        load(cluster)
        pending[:] = [
            (panel, expression)
            for panel, expression in pending
            if not is_told(expression) and panel not in NOT_HERE
        ]
        return not pending

    try:
        until(have_data, "every query has data", 400)
    except AssertionError:
        assert pending == [], "these queries have no data"


def test_what_callers_make_up_is_no_label(cluster: Cluster) -> None:
    """F50: neither models, paths, methods nor ids of strangers make series."""
    queen, strange = cluster.queen.url, "strange-{}"
    for number in range(20):
        name = strange.format(number)
        cluster.events({"operation": "infer", "model": name, "prompt": "x"})
        body = {"model": name, "messages": [{"role": "user", "content": "x"}]}
        httpx.post(f"{queen}/v1/chat/completions", json=body, headers=cluster.auth)
        httpx.get(f"{queen}/{name}", headers=cluster.auth)
        httpx.get(f"{queen}/v1/jobs/{name}", headers=cluster.auth)
        httpx.get(f"{cluster.hive.url}/v1/workers/{name}/metrics", headers=cluster.auth)

    for text in scraped(cluster).values():
        assert "strange" not in text
        assert len(text.splitlines()) < 1500


def test_all_that_a_worker_does_is_told_under_its_model(cluster: Cluster) -> None:
    """prometheus.yml drops the worker's own label for that of its target: two models would be one series."""
    load(cluster)
    ask = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 4}
    pinned = {"operation": "openai", "endpoint": "/v1/chat/completions", "worker_id": worker_id(cluster)}
    assert cluster.events(pinned | {"body": ask}, cluster.hive.url)[-1]["action"] == "execute_complete"

    assert set(re.findall(r'\bmodel="([^"]*)"', scraped(cluster)["worker"])) == {MODEL}


def test_a_worker_that_is_not_there_is_told_from_one_that_is(cluster: Cluster) -> None:
    answer = httpx.get(f"{cluster.hive.url}/v1/workers/nobody/metrics", headers=cluster.auth)

    assert (answer.status_code, answer.json()["code"]) == (404, "worker_not_found")
    assert httpx.get(f"{cluster.hive.url}/v1/workers/{worker_id(cluster)}/metrics").status_code == 401
