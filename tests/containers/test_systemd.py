"""rbee as systemd's services, on a machine (a container) with systemd as PID 1.

What is asserted is what a client sees, what systemd says of its units, and which processes there are.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import docker
import httpx
import pytest
from docker.models.containers import Container
from rbee_containers import LABEL, REPOSITORY, do, run
from rbee_processes import until
from rbee_restarts import BackgroundReader

from rbee_contracts.nodes import SERVING

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

HERE = REPOSITORY / "tests/containers/systemd"
IMAGE = "rbee-systemd:test"
RBEE = "/opt/rbee/bin/rbee"
UNITS = "/etc/systemd/system"
PATIENCE_S = 180.0

MODELS = "/srv/two words 100%h"
"""A folder of models whose name has all that units give a meaning."""


class Machine:
    """A container with systemd, with what tests do on it and see of it."""

    def __init__(self, engine: docker.DockerClient, run_id: str) -> None:
        self.container: Container = engine.containers.run(
            IMAGE,
            detach=True,
            hostname="box1",
            privileged=True,
            cgroupns="private",
            tmpfs={"/run": "", "/tmp": "exec"},
            ports={"7833/tcp": ("127.0.0.1", None)},
            labels={LABEL: run_id},
        )
        try:
            until(self._has_booted, "systemd has started the machine", PATIENCE_S)
        except BaseException:
            self.close()
            raise

    def _has_booted(self) -> bool:
        code, state = self.attempt("systemctl", "is-system-running")
        assert "degraded" not in state, self.sh("systemctl", "--failed", "--no-pager")
        return code == 0

    def close(self) -> None:
        self.container.remove(force=True, v=True)

    def attempt(self, *command: str, **environ: str) -> tuple[int, str]:
        """Run a command there; give its status and all that it said."""
        return do(self.container, *command, environment=environ)

    def sh(self, *command: str, **environ: str) -> str:
        """Run a command there that must succeed."""
        code, said = self.attempt(*command, **environ)
        assert code == 0, f"status {code} of {' '.join(command)}: {said}\n{self.journal()}"
        return said

    def rbee(self, *arguments: str) -> str:
        return self.sh(RBEE, *arguments, RBEE_TOKEN=self.token)

    def write(self, path: str, text: str) -> None:
        self.sh("sh", "-c", f'mkdir -p "$(dirname {path})" && printf %s "$TEXT" > {path}', TEXT=text)

    def journal(self) -> str:
        return self.attempt("journalctl", "--no-pager", "--output=cat", "--lines=60")[1]

    def until_logged(self, unit: str, text: str) -> None:
        """Wait until the journal, which takes lines a little after they were written, has one of a unit."""
        command = ("journalctl", "--no-pager", "--output=cat", f"--unit={unit}")
        until(lambda: text in self.sh(*command), f"the journal of {unit} has {text!r}", PATIENCE_S)

    def show(self, unit: str, name: str) -> str:
        return self.sh("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def is_active(self, unit: str) -> bool:
        return self.attempt("systemctl", "is-active", unit)[1].strip() == "active"

    def check_runs(self, unit: str) -> None:
        """Fail unless a service is active, now, and has been so from its start."""
        assert self.is_active(unit), self.journal()
        assert self.show(unit, "NRestarts") == "0", self.journal()

    def main_pid(self, unit: str) -> int:
        return int(self.show(unit, "MainPID"))

    def processes(self) -> list[str]:
        """Give the command lines of all processes of rbee's user, but for the queen."""
        lines = self.attempt("ps", "-u", "rbee", "-o", "pid=,args=")[1].splitlines()
        return [line for line in lines if "rbee-queen" not in line]

    # --- the cluster on it -----------------------------------------------------------------------------

    @property
    def token(self) -> str:
        return self.sh("cat", "/etc/rbee/token").strip()

    @property
    def queen_url(self) -> str:
        self.container.reload()
        return f"http://127.0.0.1:{self.container.ports['7833/tcp'][0]['HostPort']}"

    def install(self) -> None:
        """Have a queen and a hive with simulated workers."""
        self.sh(RBEE, "install", "queen")
        self.sh(RBEE, "install", "hive", "--no-start")
        self.sh("sh", "-c", "echo 'worker_engine = \"sim\"' >> /etc/rbee/hive.toml")
        self.sh("systemctl", "start", "rbee-hive")

    def submit(self, **operation: Any) -> str:
        answer = httpx.post(f"{self.queen_url}/v1/jobs", json=operation, headers=self.bearer, timeout=30)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["job_id"])

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def read(self, job_id: str) -> BackgroundReader:
        return BackgroundReader(self.queen_url, job_id, **self.bearer)

    def hive_workers(self) -> list[dict[str, Any]]:
        """Give what the hive itself tells of its workers; the queen's view may be a second old."""
        command = (RBEE, "--hive", "http://127.0.0.1:7835", "worker", "list", "--json")

        def told() -> Any:
            code, said = self.attempt(*command, RBEE_TOKEN=self.token)
            return json.loads(said) if code == 0 else None

        return list(until(told, "the hive answers", PATIENCE_S)["workers"])

    def worker(self) -> dict[str, Any]:
        """Give the one worker once it takes requests and the queen knows; start one where there is none."""

        def ready() -> dict[str, Any] | None:
            of_queen = [worker for hive in self.online_hives() for worker in hive.get("workers", ())]
            known = {worker["pid"] for worker in of_queen if worker["state"] in SERVING}
            serving = (worker for worker in self.hive_workers() if worker["state"] in SERVING)
            return next((worker for worker in serving if worker["pid"] in known), None)

        until(self.online_hives, "the hive is online", PATIENCE_S)
        if not self.hive_workers():
            self.rbee("worker", "spawn", "--model", "m", "--", "--sim-step-ms", "50")
        return until(ready, "the worker is ready", PATIENCE_S)

    def online_hives(self) -> list[dict[str, Any]]:
        """Give the hive as the queen has it, once she hears it."""
        code, said = self.attempt(RBEE, "hive", "list", "--json", RBEE_TOKEN=self.token)
        hives = json.loads(said)["hives"] if code == 0 else []
        return [hive for hive in hives if hive["state"] == "online"]


@contextmanager
def machine_of(engine: docker.DockerClient, run_id: str) -> Iterator[Machine]:
    machine = Machine(engine, run_id)
    try:
        yield machine
    finally:
        machine.close()


@pytest.fixture(scope="module")
def systemd_image(image: Callable[[str], str]) -> None:
    """Build `IMAGE`."""
    names = [f"QUEEN_IMAGE={image('queen')}", f"HIVE_IMAGE={image('hive')}"]
    arguments = [word for name in names for word in ("--build-arg", name)]
    run("docker", "buildx", "build", "--progress", "plain", *arguments, "--tag", IMAGE, HERE, timeout_s=1200)


@pytest.fixture
def machine(engine: docker.DockerClient, systemd_image: None, run_id: str) -> Iterator[Machine]:
    """A machine on which nothing is installed, for one test."""
    with machine_of(engine, run_id) as made:
        yield made


@pytest.fixture(scope="module")
def installed(engine: docker.DockerClient, systemd_image: None, run_id: str) -> Iterator[Machine]:
    with machine_of(engine, run_id) as made:
        made.install()
        yield made


@pytest.fixture
def cluster(installed: Machine) -> Iterator[Machine]:
    """A machine with both services and a worker, however the test before has left it.

    What it has logged is printed: pytest shows it where a test has failed.
    """
    installed.sh("systemctl", "start", "rbee-queen", "rbee-hive")
    installed.worker()
    yield installed
    print(installed.attempt("journalctl", "--no-pager", "--output=short-precise", "--lines=300")[1])


PROMPT = {
    "operation": "infer",
    "model": "m",
    "prompt": "go on",
    "temperature": 0,
    "ignore_eos": True,
    "resume_window_s": 120,  # for a reader that a busy machine keeps from coming back at once
}

LONG = 400
"""Tokens of an answer that outlasts a restart: 20 s."""


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["message"] for event in events if event["action"] == "token")


def test_systemd_accepts_the_units_and_they_are_closed(cluster: Machine) -> None:
    files = [f"{UNITS}/{name}.service" for name in ("rbee-queen", "rbee-hive", "rbee-hive-workers")]

    assert cluster.sh("systemd-analyze", "verify", *files) == ""
    for unit, limit in (("rbee-queen", 1.5), ("rbee-hive", 2.5), ("rbee-hive-workers", 2.5)):
        said = cluster.sh("systemd-analyze", "security", "--no-pager", f"{unit}.service")
        exposure = re.search(r"exposure level for \S+: ([0-9.]+)", said)

        assert exposure is not None
        assert float(exposure[1]) <= limit


def test_a_job_runs_through_queen_hive_and_worker(cluster: Machine) -> None:
    with cluster.read(cluster.submit(**PROMPT, max_tokens=8)) as reader:
        events = reader.until_end()

    assert events[-1]["action"] == "execute_complete"
    assert len(text_of(events).split()) == 8
    for unit in ("rbee-queen", "rbee-hive"):
        assert cluster.show(unit, "NotifyAccess") == "main"
        assert cluster.show(unit, "User") == "rbee"
    for unit, text in (("rbee-hive", "1 ready"), ("rbee-queen", "online: 1 of 1")):
        until(lambda: text in cluster.show(unit, "StatusText"), f"{unit} tells {text}", PATIENCE_S)  # noqa: B023


def test_a_restart_of_the_hive_keeps_the_worker_and_the_open_stream(cluster: Machine) -> None:
    before, hive = cluster.worker(), cluster.main_pid("rbee-hive")
    with cluster.read(cluster.submit(**PROMPT, max_tokens=LONG)) as reader:
        reader.until_tokens(10)
        cluster.sh("systemctl", "restart", "rbee-hive")
        seen_then = len(reader.tokens)
        events = reader.until_end()

    assert seen_then < LONG
    assert cluster.main_pid("rbee-hive") not in (0, hive)
    after = cluster.worker()
    assert (after["worker_id"], after["pid"]) == (before["worker_id"], before["pid"])
    assert after.get("restarts", 0) == 0
    assert events[-1]["action"] == "execute_complete"
    assert [event["index"] for event in events if event["action"] == "token"] == list(range(LONG))
    with cluster.read(cluster.submit(**PROMPT, max_tokens=LONG)) as again:
        assert text_of(events) == text_of(again.until_end())


def test_a_restart_of_the_queen_keeps_the_open_stream(cluster: Machine) -> None:
    tokens = 900  # 45 s: it outlasts the 30 s for which a queen that is stopped lets streams end
    with cluster.read(cluster.submit(**PROMPT, max_tokens=tokens)) as reader:
        reader.until_tokens(10)
        cluster.sh("systemctl", "restart", "rbee-queen")
        assert not reader.done
        events = reader.until_end()

    assert events[-1]["action"] == "execute_complete"
    assert [event["index"] for event in events if event["action"] == "token"] == list(range(tokens))


def test_a_killed_hive_is_started_again_and_adopts_its_worker(cluster: Machine) -> None:
    before, hive = cluster.worker(), cluster.main_pid("rbee-hive")
    restarts = int(cluster.show("rbee-hive", "NRestarts"))
    with cluster.read(cluster.submit(**PROMPT, max_tokens=200)) as reader:
        reader.until_tokens(10)
        cluster.sh("systemctl", "kill", "--signal=KILL", "--kill-who=main", "rbee-hive")
        until(lambda: cluster.main_pid("rbee-hive") not in (0, hive), "there is a hive again", PATIENCE_S)
        events = reader.until_end()

    assert int(cluster.show("rbee-hive", "NRestarts")) == restarts + 1
    assert cluster.worker()["pid"] == before["pid"]
    assert events[-1]["action"] == "execute_complete"
    assert [event["index"] for event in events if event["action"] == "token"] == list(range(200))


@pytest.mark.parametrize("unit", ["rbee-queen", "rbee-hive"])
def test_a_service_that_stands_still_is_ended_by_the_watchdog_and_started_again(
    cluster: Machine, unit: str
) -> None:
    worker, before = cluster.worker()["pid"], cluster.main_pid(unit)
    restarts = int(cluster.show(unit, "NRestarts"))
    cluster.sh("kill", "-STOP", str(before))

    until(lambda: int(cluster.show(unit, "NRestarts")) > restarts, "the watchdog has fired", PATIENCE_S)
    until(lambda: cluster.is_active(unit), "the service is ready again", PATIENCE_S)

    assert cluster.main_pid(unit) not in (0, before)
    assert cluster.worker()["pid"] == worker
    cluster.until_logged(unit, "Watchdog timeout")
    cluster.until_logged(unit, "Fatal Python error: Aborted")  # and where it stood


def until_nothing_is_left(machine: Machine) -> None:
    until(lambda: not machine.processes(), f"no process is left, but {machine.processes()}", 60)
    ended = ("inactive", "failed")
    for unit in ("rbee-hive", "rbee-hive-workers"):
        until(lambda unit=unit: machine.show(unit, "ActiveState") in ended, f"{unit} has ended", 60)  # type: ignore[misc]
    assert machine.show("rbee-hive-workers", "Result") == "success"
    assert machine.processes() == []
    assert machine.attempt("sh", "-c", "ls /var/lib/rbee-hive/state/workers/*.json")[0] != 0


def test_a_stop_ends_the_workers(cluster: Machine) -> None:
    cluster.worker()
    cluster.sh("systemctl", "stop", "rbee-hive")

    assert cluster.show("rbee-hive", "Result") == "success"
    assert [line for line in cluster.processes() if "rbee_worker" in line] == []
    until_nothing_is_left(cluster)
    assert cluster.attempt("ls", "/run/rbee-hive")[0] != 0


def test_a_stop_waits_for_a_stream_that_takes_longer_than_the_units_limit(cluster: Machine) -> None:
    cluster.worker()
    cluster.write(f"{UNITS}/rbee-hive.service.d/short.conf", "[Service]\nTimeoutStopSec=2\n")
    cluster.sh("systemctl", "daemon-reload")
    try:
        with cluster.read(cluster.submit(**PROMPT, max_tokens=200)) as reader:
            reader.until_tokens(10)
            cluster.sh("systemctl", "stop", "rbee-hive")
            events = reader.until_end()

        assert events[-1]["action"] == "execute_complete"
        assert cluster.show("rbee-hive", "Result") == "success"
        until_nothing_is_left(cluster)
    finally:
        cluster.sh("rm", f"{UNITS}/rbee-hive.service.d/short.conf")
        cluster.sh("systemctl", "daemon-reload")


def test_a_stop_while_the_hive_waits_to_be_started_again_ends_the_workers(cluster: Machine) -> None:
    cluster.worker()
    cluster.write(f"{UNITS}/rbee-hive.service.d/later.conf", "[Service]\nRestartSec=3600\n")
    cluster.sh("systemctl", "daemon-reload")
    try:
        cluster.sh("systemctl", "kill", "--signal=KILL", "--kill-who=main", "rbee-hive")
        until(lambda: cluster.show("rbee-hive", "SubState") == "auto-restart", "it is to come back", 60)
        assert len(cluster.processes()) == 1
        cluster.sh("systemctl", "stop", "rbee-hive")

        until_nothing_is_left(cluster)
    finally:
        cluster.sh("rm", f"{UNITS}/rbee-hive.service.d/later.conf")
        cluster.sh("systemctl", "daemon-reload")


def test_a_stop_in_which_the_hive_is_killed_ends_the_workers(cluster: Machine) -> None:
    cluster.worker()
    hive = str(cluster.main_pid("rbee-hive"))
    cluster.sh("kill", "-STOP", hive)
    cluster.sh("systemctl", "stop", "--no-block", "rbee-hive")
    cluster.sh("kill", "-KILL", hive)

    until_nothing_is_left(cluster)


def test_a_hive_that_cannot_start_is_given_up_and_leaves_no_worker(cluster: Machine) -> None:
    cluster.worker()
    settings = cluster.sh("cat", "/etc/rbee/hive.toml")
    cluster.write(f"{UNITS}/rbee-hive.service.d/less.conf", "[Unit]\nStartLimitBurst=3\n")
    cluster.sh("systemctl", "daemon-reload")
    cluster.sh("systemctl", "reset-failed", "rbee-hive")
    try:
        cluster.write("/etc/rbee/hive.toml", settings + "prot = 7835\n")
        code, _ = cluster.attempt("systemctl", "restart", "rbee-hive")
        assert code != 0
        until(lambda: cluster.show("rbee-hive", "ActiveState") == "failed", "it is given up", PATIENCE_S)

        until_nothing_is_left(cluster)
        cluster.until_logged("rbee-hive", "there is no setting prot. Did you mean port?")
    finally:
        cluster.write("/etc/rbee/hive.toml", settings)
        cluster.sh("rm", f"{UNITS}/rbee-hive.service.d/less.conf")
        cluster.sh("systemctl", "daemon-reload")
        cluster.sh("systemctl", "reset-failed", "rbee-hive")


def test_a_worker_does_not_speak_for_the_hive_and_is_not_protected_like_it(cluster: Machine) -> None:
    worker, hive = cluster.worker()["pid"], cluster.main_pid("rbee-hive")
    environ = cluster.sh("cat", f"/proc/{worker}/environ")

    assert "NOTIFY_SOCKET" not in environ
    assert "WATCHDOG_" not in environ
    assert "TMPDIR=/run/rbee-hive" in environ
    assert cluster.sh("cat", f"/proc/{worker}/oom_score_adj").strip() == "0"
    assert cluster.show("rbee-hive", "OOMScoreAdjust") == "-500"  # which not every container may have
    for pid in (worker, hive):
        status = cluster.sh("cat", f"/proc/{pid}/status")
        assert re.search(r"^NoNewPrivs:\s1$", status, re.MULTILINE)
        assert re.search(r"^Seccomp:\s2$", status, re.MULTILINE)
        assert re.search(r"^CapBnd:\s0+$", status, re.MULTILINE)


def test_the_shutdown_of_the_machine_stops_the_workers(machine: Machine) -> None:
    machine.install()
    machine.worker()
    machine.container.stop(timeout=100)
    machine.container.reload()

    assert machine.container.attrs["State"]["ExitCode"] != 137
    chunks, _ = machine.container.get_archive("/var/lib/rbee-hive/state")
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
        names = archive.getnames()
        records = [name for name in names if re.search(r"workers/.*\.json$", name)]
        logs = [name for name in names if re.search(r"logs/.*\.log$", name)]
        assert len(logs) == 1
        log = archive.extractfile(logs[0])
        assert log is not None
        last = json.loads(log.read().splitlines()[-1])
    assert records == []
    assert (last["event"], last["exit_code"]) == ("stopped", 0)


def listing(machine: Machine) -> set[str]:
    """Give every file and folder that an installation could have made or left."""
    # What comes and goes while it looks, in /run, is no error.
    found = machine.sh(
        "find", "/etc", "/run", "/srv", "/var/cache", "/var/lib", "-ignore_readdir_race", "-xdev"
    )
    return {line for line in found.splitlines() if "rbee" in line or line.startswith("/srv/")}


def test_an_installation_is_repeatable_keeps_edits_and_goes_without_a_trace(machine: Machine) -> None:
    before = listing(machine)

    would = machine.sh(RBEE, "install", "queen", "--dry-run")
    assert "would be created  /etc/rbee/token" in would
    assert listing(machine) == before
    code, said = machine.attempt(RBEE, "install", "hive")
    assert (code, "say where the hive finds hers: --queen" in said) == (1, True)
    code, said = machine.attempt(RBEE, "install", "hive", "--queen", "http://10.0.0.9:7833")
    assert (code, "a hive needs the token of its cluster" in said) == (1, True)
    assert listing(machine) == before

    assert "created  /etc/rbee/token" in machine.sh(RBEE, "install", "queen")
    assert "nothing was changed" in machine.sh(RBEE, "install", "queen")
    modes = machine.sh("stat", "-c", "%a %U %G", "/etc/rbee", "/etc/rbee/token", "/etc/rbee/queen.env")
    assert modes.split("\n")[:3] == ["750 root rbee", "600 rbee rbee", "640 root rbee"]
    machine.sh(RBEE, "install", "hive", "--models-dir", MODELS)
    machine.check_runs("rbee-queen")
    machine.check_runs("rbee-hive")
    assert machine.sh("systemctl", "is-enabled", "rbee-queen", "rbee-hive").split() == ["enabled", "enabled"]
    machine.sh("sh", "-c", f"runuser -u rbee -- touch '{MODELS}/mine'")

    machine.sh(
        "sh", "-c", "echo '# mine' >> /etc/rbee/hive.toml; echo '# old' >> " + f"{UNITS}/rbee-hive.service"
    )
    said = machine.sh(RBEE, "install", "hive", "--models-dir", MODELS)
    assert "kept     /etc/rbee/hive.toml" in said
    assert f"changed  {UNITS}/rbee-hive.service" in said
    assert "systemctl restart rbee-hive.service" in said
    assert machine.sh("tail", "-1", "/etc/rbee/hive.toml") == "# mine\n"

    machine.sh(RBEE, "uninstall", "queen")
    assert not machine.is_active("rbee-queen")
    assert machine.sh("ls", "/etc/rbee").split() == ["hive.toml", "queen.env", "token"]
    assert machine.sh("ls", "/var/lib/rbee-queen") != ""
    machine.check_runs("rbee-hive")
    machine.sh(RBEE, "install", "queen")
    machine.check_runs("rbee-queen")
    machine.sh(RBEE, "uninstall", "queen", "--purge", "--yes")
    machine.sh(RBEE, "uninstall", "hive", "--purge", "--yes")

    assert machine.attempt("id", "rbee")[0] != 0
    left = {line for line in listing(machine) - before if not line.startswith(MODELS)}
    assert left == set()
    assert f"{MODELS}/mine" in machine.sh("find", "/srv")
    assert "rbee" not in machine.sh("systemctl", "list-units", "--all", "--no-legend", "--plain", "rbee*")
    assert [line for line in machine.sh("ps", "-eo", "args=").splitlines() if "rbee" in line] == []
    assert "nothing was changed" in machine.sh(RBEE, "uninstall", "hive")
