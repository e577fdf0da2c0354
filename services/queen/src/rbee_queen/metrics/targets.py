"""What Prometheus asks the queen for, so that it needs no other address: every service of the cluster.

The answer is that of Prometheus' HTTP service discovery. A worker speaks to its hive alone, which passes on
what the worker tells: so the address of a worker's metrics is its hive's, and the path names the worker.
"""

from collections.abc import Iterable
from urllib.parse import urlsplit

from msgspec import Struct

from rbee_contracts.nodes import HiveInfo, WorkerState

METRICS_PATH = "/metrics"

ANSWERING: frozenset[WorkerState] = frozenset({"ready", "busy", "sleeping", "draining"})
"""States in which a worker is scraped: before, its process is loading and does not answer."""


class Target(Struct, frozen=True, kw_only=True):
    """One group of targets: addresses, and the labels that all their series get."""

    targets: list[str]
    labels: dict[str, str]


def targets(queen: str, hives: Iterable[HiveInfo]) -> list[Target]:
    """Give the queen, every hive that is not lost, and every worker that answers.

    Args:
        queen: where the queen was asked, as `host:port`.
    """
    found = [_target("http", queen, METRICS_PATH, service="queen")]
    for hive in hives:
        if hive.state == "lost":
            continue
        url = urlsplit(hive.url)
        found.append(_target(url.scheme, url.netloc, METRICS_PATH, service="hive", hive=hive.hive_id))
        for worker in hive.workers:
            if worker.state in ANSWERING:
                path = f"/v1/workers/{worker.worker_id}/metrics"
                labels = {"hive": hive.hive_id, "worker": worker.worker_id, "model": worker.model}
                found.append(_target(url.scheme, url.netloc, path, service="worker", **labels))
    return found


def _target(scheme: str, address: str, path: str, **labels: str) -> Target:
    return Target(
        targets=[address],
        labels={"__scheme__": scheme, "__metrics_path__": path, **labels},
    )
