"""Queens that are killed and come back, and clients that outlast them."""

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from rbee_processes import Cluster, Service, until


class RestartableCluster(Cluster):
    """A cluster whose queen keeps its port and its state when it is started again."""

    def __init__(self, folder: Path, *, engine: str) -> None:
        super().__init__(folder, engine=engine, queen_args=["--state-dir", str(folder / "q")])
        self._starts = 1

    def kill_queen(self) -> None:
        self.queen.kill()

    def start_queen(self) -> None:
        port = self.queen.url.rpartition(":")[2]
        self._starts += 1
        log = self.folder / f"queen{self._starts}.log"
        self.queen = Service(
            "rbee-queen", ["--port", port, "--state-dir", str(self.folder / "q")], log, self.marker
        )


class Reader:
    """Reads a job to its end across any number of broken connections, as a client would."""

    def __init__(self, url: str, job_id: str) -> None:
        self.url = url
        self.job_id = job_id
        self.events: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.done = False

    def read(self, deadline_s: float = 120.0) -> "Reader":
        deadline = time.monotonic() + deadline_s
        while not self.done and time.monotonic() < deadline:
            headers = {"Last-Event-ID": self.ids[-1]} if self.ids else {}
            try:
                with httpx.stream(
                    "GET", f"{self.url}/v1/jobs/{self.job_id}/stream", headers=headers, timeout=30
                ) as response:
                    if response.status_code == 204:
                        self.done = True
                    elif response.status_code == 200:
                        self._take(response)
                    elif response.status_code != 503:
                        raise AssertionError(response.read())
            except httpx.TransportError:
                pass
            if not self.done:
                time.sleep(0.05)
        assert self.done, f"{self.job_id} did not end; had {len(self.events)} events"
        return self

    def _take(self, response: httpx.Response) -> None:
        event_id = ""
        for line in response.iter_lines():
            if line.startswith("id: "):
                event_id = line[4:]
            elif line == "data: [DONE]":
                self.done = True
                return
            elif line.startswith("data: "):
                self.events.append(json.loads(line[6:]))
                self.ids.append(event_id)


def read_through_a_kill(cluster: RestartableCluster, readers: Sequence[Reader], down_s: float) -> None:
    """Read all jobs to their ends, with the queen killed once all are under way, and down for a while."""
    with ThreadPoolExecutor(len(readers)) as pool:
        results = [pool.submit(reader.read) for reader in readers]
        until(lambda: all(len(reader.events) > 30 for reader in readers), "all streams are under way", 60)
        cluster.kill_queen()
        threading.Event().wait(down_s)  # the outage itself
        cluster.start_queen()
        for result in results:
            result.result(120)
