"""A hive that is gone for good can be forgotten, for good; one that is there after all is listed again."""

from pathlib import Path

from rbee_processes import Cluster, text_of, until

SOON_LOST = ("--hive-unreachable-after-s", "5", "--hive-lost-after-s", "10")
INFER = {"operation": "infer", "model": "m", "prompt": "a", "max_tokens": 3}


def hives(cluster: Cluster) -> list[str]:
    return [hive["state"] for hive in cluster.run({"operation": "hive_list"})["hives"]]


def test_a_hive_that_is_gone_is_forgotten_over_a_restart_and_returns_as_any_other(tmp_path: Path) -> None:
    with Cluster(tmp_path, engine="sim", queen_args=SOON_LOST) as cluster:
        spawned = cluster.spawn("m")
        cluster.hive.kill()
        until(lambda: hives(cluster) == ["lost"], "the hive is lost", 120)

        forgotten = cluster.run({"operation": "hive_forget", "hive_id": "box1"})
        assert (forgotten["hive_id"], forgotten["state"]) == ("box1", "lost")
        assert hives(cluster) == []
        again = cluster.events({"operation": "hive_forget", "hive_id": "box1"})
        assert again[-1]["code"] == "hive_not_found"
        cluster.queen.kill()
        cluster.start_queen()
        assert hives(cluster) == [], "the queen remembers what she was told to forget"

        cluster.restart_hive("0")
        until(cluster._is_online, "the hive is listed again")
        assert until(lambda: text_of(cluster.events(INFER)), "its worker answers")
        (worker,) = cluster.run({"operation": "worker_list"})["workers"]
        assert worker["worker_id"] == spawned["worker_id"]


def test_a_hive_that_is_there_is_not_forgotten(tmp_path: Path) -> None:
    with Cluster(tmp_path, engine="sim") as cluster:
        refused = cluster.events({"operation": "hive_forget", "hive_id": "box1"})

        assert refused[-1]["code"] == "hive_not_lost"
        assert "Stop it first" in refused[-2]["message"]
        assert len(hives(cluster)) == 1
