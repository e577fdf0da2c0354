"""Queens that are killed and come back, and clients that outlast them."""

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from rbee_processes import Cluster, Service, until


class RestartableCluster(Cluster):
    """A cluster whose queen keeps its port and its state when it is started again."""

    def kill_queen(self) -> None:
        self.queen.kill()


class Reader:
    """Reads a job to its end across any number of broken connections, as a client would."""

    def __init__(self, url: str, job_id: str, **headers: str) -> None:
        self.url = url
        self.job_id = job_id
        self.headers = headers
        self.events: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.done = False
        self.trouble: list[str] = []
        """What kept it from reading, each when it was first met."""

    def read(self, deadline_s: float = 240.0) -> "Reader":
        deadline = time.monotonic() + deadline_s
        while not self.done and time.monotonic() < deadline:
            headers = self.headers | ({"Last-Event-ID": self.ids[-1]} if self.ids else {})
            try:
                with httpx.stream(
                    "GET", f"{self.url}/v1/jobs/{self.job_id}/stream", headers=headers, timeout=90
                ) as response:
                    if response.status_code == 204:
                        self.done = True
                    elif response.status_code == 200:
                        self._take(response)
                    elif response.status_code == 503:
                        self._note(response.read().decode(errors="replace"))
                    else:
                        raise AssertionError(response.read())
            except httpx.TransportError as exc:
                self._note(repr(exc))
            if not self.done:
                time.sleep(0.05)
        assert self.done, f"{self.job_id} did not end; had {len(self.events)} events; met {self.trouble}"
        return self

    def _note(self, trouble: str) -> None:
        if trouble not in self.trouble:
            self.trouble.append(trouble)

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
        until(lambda: all(len(reader.events) > 30 for reader in readers), "all streams are under way", 120)
        cluster.kill_queen()
        threading.Event().wait(down_s)  # the outage itself
        cluster.start_queen()
        for result in results:
            result.result(300)


class FleetCluster(RestartableCluster):
    """A restartable queen with as many hives as a test needs; `box1` is there from the start."""

    def __init__(self, folder: Path, *queen_args: str, token: str | None = None) -> None:
        self.others: list[Service] = []
        super().__init__(folder, engine="sim", queen_args=queen_args, token=token)

    def add_hive(self, hive_id: str, *args: str, name: str | None = None) -> Service:
        """Start one more hive; `name` tells two of one id apart."""
        name = name or hive_id
        argv = ["--port", "0", "--hive-id", hive_id, "--models-dir", str(self.folder)]
        argv += ["--state-dir", str(self.folder / name), "--worker-engine", "sim"]
        argv += ["--queen-url", self.queen.url, *args]
        hive = Service("rbee-hive", argv, self.folder / f"{name}.log", self.marker, self.token)
        self.others.append(hive)
        return hive

    def spawn_on(self, hive_id: str, *args: str) -> dict[str, Any]:
        return self.spawn("m", *args, hive_id=hive_id)

    def hive_info(self, hive_id: str) -> dict[str, Any]:
        """Give what the queen knows of a hive; empty where she knows none."""
        hives = self.run({"operation": "hive_list"})["hives"]
        return next((hive for hive in hives if hive["hive_id"] == hive_id), {})

    def until_state(self, hive_id: str, state: str, timeout_s: float = 120.0) -> None:
        until(lambda: self.hive_info(hive_id).get("state") == state, f"{hive_id} is {state}", timeout_s)

    def close(self) -> None:
        try:
            for hive in self.others:
                hive.terminate()
        finally:
            super().close()


class BackgroundReader(Reader):
    """A reader that reads beside the test."""

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(1)
        self._result = self._pool.submit(self.read)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=exc is None, cancel_futures=True)

    def until_tokens(self, count: int) -> None:
        until(lambda: len(self.tokens) >= count, f"{count} tokens have come", 120)

    def until_end(self) -> list[dict[str, Any]]:
        """Wait for the end; give all events."""
        self._result.result(300)
        return self.events

    @property
    def tokens(self) -> list[dict[str, Any]]:
        return [event for event in list(self.events) if event["action"] == "token"]
