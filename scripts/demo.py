"""Show one prompt going through a queen, a hive and a worker with a real engine, all on this machine.

Starts them, sends the request that README.md shows, prints the stream as it comes, and then finds its one
correlation id in the logs of all three. Leaves no process behind. Run by `make demo`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.prefix) / "bin"
README = ROOT / "README.md"
MODELS = ROOT / "models"
MODEL = "rbee-tiny"

QUEEN, QUEEN_PORT = "http://127.0.0.1:7833", 7833
HIVE, HIVE_PORT = "http://127.0.0.1:7835", 7835

READY_TIMEOUT_S = 60
SPAWN_TIMEOUT_S = 600
STREAM_TIMEOUT_S = 120
STOP_TIMEOUT_S = 40
DRAIN_TIMEOUT_S = 5
REST_TIMEOUT_S = 3
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class DemoFailed(Exception):
    """The demo cannot go on; the message names the cause and what to do."""


def heading(text: str) -> None:
    print(f"\n--- {text}", flush=True)


def say(text: str) -> None:
    print(text, flush=True)


# --- processes -------------------------------------------------------------------------------------------


class Services:
    """The processes of the demo: started, watched, and ended with everything below them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._libc = ctypes.CDLL(None)
        # Orphans below become children of this process, so that none gets away.
        self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._spared = set(below())

    def start(self, name: str, *arguments: str) -> None:
        program = BIN / f"rbee-{name}"
        with self.log(name).open("wb") as output:
            process = subprocess.Popen(
                [str(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C does not reach it: it is stopped in order, also when this one is killed.
                start_new_session=True,
                preexec_fn=lambda: self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),
            )
        self._running.append((name, process))

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def check(self) -> None:
        """Fail when one has died."""
        for name, process in self._running:
            if process.poll() is not None:
                raise DemoFailed(
                    f"rbee-{name} ended with status {process.returncode}; its last log lines:\n"
                    + tail(self.log(name))
                )

    def stop(self) -> None:
        """Stop the hive, which stops its workers, then the queen; end by force what does not obey."""
        for name, process in reversed(self._running):
            if process.poll() is not None:
                say(f"{name} had ended by itself with status {process.returncode}; its last log lines:")
                say(tail(self.log(name)))
            else:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_TIMEOUT_S)
                    say(f"{name} stopped")
                except subprocess.TimeoutExpired:
                    say(f"{name} did not stop within {STOP_TIMEOUT_S} s")
        self._running.clear()

    def end_rest(self) -> list[int]:
        """Wait a moment for what is still there, then SIGKILL it; give what that was."""
        deadline = time.monotonic() + REST_TIMEOUT_S
        while set(below()) - self._spared and time.monotonic() < deadline:
            reap()
            time.sleep(0.05)
        seen: set[int] = set()
        for _ in range(100):
            left = set(below()) - self._spared
            if not left:
                break
            seen |= left
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            reap()
            time.sleep(0.05)
        return sorted(seen)


def reap() -> None:
    """Take leave of processes that were adopted and have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def below() -> Iterator[int]:
    """Yield the pids of all processes below this one that have not ended."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text(errors="replace")
                state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
                if state not in "ZX":
                    children.setdefault(int(parent), []).append(int(entry.name))
    todo = [os.getpid()]
    while todo:
        found = children.get(todo.pop(), [])
        yield from found
        todo += found


def tail(path: Path, lines: int = 15) -> str:
    try:
        return "\n".join(
            f"    {line[:400]}" for line in path.read_text(errors="replace").splitlines()[-lines:]
        )
    except OSError as exc:
        return f"    ({path}: {exc.strerror})"


# --- HTTP ------------------------------------------------------------------------------------------------


def request(
    method: str, url: str, headers: dict[str, str], body: bytes | None, timeout: float
) -> Iterator[str]:
    """Send a request and yield the lines of the answer as they come, an error's too."""
    asked = urllib.request.Request(url, data=body, headers=headers, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(asked, timeout=timeout) as answer:
            for line in answer:
                yield line.decode().rstrip("\n")
    except urllib.error.HTTPError as exc:
        yield from exc.read().decode(errors="replace").splitlines()


def wait_ready(services: Services, name: str, url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        services.check()
        with contextlib.suppress(OSError, ValueError):
            if json.loads("".join(request("GET", f"{url}/ready", {}, None, 5))).get("ready"):
                say(f"{name} is ready at {url}")
                return
        time.sleep(0.1)
    raise DemoFailed(
        f"rbee-{name} was not ready after {READY_TIMEOUT_S} s; its last log lines:\n"
        + tail(services.log(name))
    )


def wait_hive_known(services: Services) -> None:
    """Wait until the queen has heard of the hive: her heartbeats name it."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    for line in request("GET", f"{QUEEN}/v1/heartbeats/stream", {}, None, READY_TIMEOUT_S):
        services.check()
        if line.startswith("data:") and '"state":"online"' in line:
            say("the queen knows the hive")
            return
        if time.monotonic() > deadline:
            break
    raise DemoFailed(
        "the queen did not see the hive; the hive's last log lines:\n" + tail(services.log("hive"))
    )


def spawn_worker() -> str:
    """Have the hive load the model, through the queen; shows the narration."""
    headers = {"Content-Type": "application/json"}
    operation = {"operation": "worker_spawn", "model": MODEL}
    answer = json.loads(
        "".join(request("POST", f"{QUEEN}/v1/jobs", headers, json.dumps(operation).encode(), 30))
    )
    if "sse_url" not in answer:
        raise DemoFailed(f"the queen refused worker_spawn: {answer}")
    for event in events(request("GET", QUEEN + answer["sse_url"], {}, None, SPAWN_TIMEOUT_S)):
        if event["action"] == "execute_complete":
            return str(event["data"]["worker_id"])
        if event["action"].startswith("execute_"):
            raise DemoFailed("the worker could not be started; the lines above say why")
        say(event.get("formatted") or event["message"])
    raise DemoFailed("the stream of worker_spawn ended without a verdict")


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the events among the lines of a stream."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


# --- the request of README.md ----------------------------------------------------------------------------


def block(name: str) -> str:
    """Give the command that README.md shows under a mark, so that the two are the same."""
    match = re.search(rf"<!-- test: {name} -->\n```bash\n(.*?)```", README.read_text(), re.DOTALL)
    if match is None:
        raise DemoFailed(f"README.md has no block marked {name}")
    return match[1].strip()


def runner() -> Callable[[str, dict[str, str]], Iterator[str]]:
    """Choose how the commands are run: as they stand where there is a curl, else by this script."""
    if shutil.which("curl"):
        return run_in_shell
    say("There is no curl here (Debian: apt install curl), so this script sends the same request itself.")
    return run_without_curl


def run_in_shell(command: str, variables: dict[str, str]) -> Iterator[str]:
    """Run a command and yield its lines as they come.

    Raises:
        DemoFailed: it did not succeed, or took too long.
    """
    process = subprocess.Popen(
        [shutil.which("bash") or "sh", "-c", command],
        env={**os.environ, "no_proxy": "*", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    deadline = time.monotonic() + STREAM_TIMEOUT_S
    rest = b""
    try:
        while select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line.decode()
        else:
            raise DemoFailed(f"no end after {STREAM_TIMEOUT_S} s: {command}")
        if rest:
            yield rest.decode()
        if process.wait(10) != 0:
            raise DemoFailed(f"status {process.returncode} of: {command}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


def run_without_curl(command: str, variables: dict[str, str]) -> Iterator[str]:
    """Do what a curl command of README.md says."""
    for name, value in variables.items():
        command = command.replace(f"${name}", value)
    words = shlex.split(command.replace("\\\n", " "))[1:]
    method, headers, body, url = "GET", {}, None, ""
    while words:
        word = words.pop(0)
        if word == "-H":
            key, _, value = words.pop(0).partition(":")
            headers[key] = value.strip()
        elif word == "-d":
            method, body = "POST", words.pop(0).encode()
        elif word == "-X":
            method = words.pop(0)
        elif not word.startswith("-"):
            url = word
    return request(method, url, headers, body, STREAM_TIMEOUT_S)


def ask(run: Callable[[str, dict[str, str]], Iterator[str]]) -> str:
    """Submit the request and show its stream; give its correlation id."""
    submit, stream = block("readme-submit"), block("readme-stream")
    say(f"$ {submit}")
    answer = "\n".join(run(submit, {}))
    say(answer)
    try:
        job_id = json.loads(answer)["job_id"]
    except (ValueError, KeyError, TypeError) as exc:
        raise DemoFailed("the queen did not answer with a job; its answer is above") from exc
    say(f"\n$ JOB_ID={job_id}\n$ {stream}")
    verdict, text, correlation_ids, is_done = "", "", set(), False
    for line in run(stream, {"JOB_ID": job_id}):
        say(line)
        is_done = is_done or line == "data: [DONE]"
        for event in events(iter([line])):
            correlation_ids.add(event["correlation_id"])
            if event["action"] == "token":
                text += event["message"]
            elif event["action"].startswith("execute_"):
                verdict = event["action"]
    heading("The answer, put together")
    say(text)
    if verdict != "execute_complete" or not is_done or not text:
        raise DemoFailed(f"the job did not succeed: verdict {verdict or 'none'}, [DONE] {is_done}")
    if len(correlation_ids) != 1:
        raise DemoFailed(
            f"the events have {len(correlation_ids)} correlation ids, not one: {correlation_ids}"
        )
    return str(correlation_ids.pop())


def show_correlation(correlation_id: str, logs: dict[str, Path]) -> None:
    """Show the lines of each log that have the id, shortened."""
    missing = []
    for name, path in logs.items():
        lines = [line for line in path.read_text(errors="replace").splitlines() if correlation_id in line]
        say(f"{name}:")
        for line in lines[:6]:
            say(f"    {shorten(line, correlation_id)}")
        if not lines:
            missing.append(name)
    if missing:
        raise DemoFailed(f"{correlation_id} is not in the log of: {', '.join(missing)}")


def shorten(line: str, correlation_id: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return line if len(line) <= 160 else f"{line[:157]}..."
    about = {key: entry[key] for key in ("job_id", "operation", "state") if entry.get(key)}
    words = " ".join(f"{key}={value}" for key, value in about.items())
    return f"{entry.get('event', '')}  {words}  correlation_id={correlation_id}"


# --- the whole -------------------------------------------------------------------------------------------


def check_before() -> None:
    """Find out now what would fail later."""
    if not (BIN / "rbee-queen").exists():
        raise DemoFailed(f"rbee is not installed in {sys.prefix}; run: make setup")
    if not (MODELS / MODEL / "model.safetensors").exists():
        raise DemoFailed(f"models/{MODEL} has no weights; is the checkout complete?")
    for name, port in (("queen", QUEEN_PORT), ("hive", HIVE_PORT)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as exc:
                raise DemoFailed(
                    f"port {port}, which the {name} needs, cannot be used: {exc.strerror}. "
                    "Stop what listens there (a running `rbee up`?) and run it again."
                ) from exc


def demo(services: Services, folder: Path) -> None:
    heading("A queen and a hive")
    drain = ("--drain-timeout-s", str(DRAIN_TIMEOUT_S))
    services.start("queen", "--port", str(QUEEN_PORT), *drain)
    services.start(
        "hive",
        *("--port", str(HIVE_PORT), "--queen-url", QUEEN, "--models-dir", str(MODELS)),
        *("--state-dir", str(folder), *drain),
    )
    wait_ready(services, "queen", QUEEN)
    wait_ready(services, "hive", HIVE)
    wait_hive_known(services)
    heading(f"A worker with {MODEL}; loading the engine takes half a minute")
    worker_id = spawn_worker()
    heading("One request, as README.md shows it")
    correlation_id = ask(runner())
    heading("Its one correlation id, in the log of every service")
    show_correlation(
        correlation_id,
        {
            "queen": services.log("queen"),
            "hive": services.log("hive"),
            f"worker {worker_id}": folder / "logs" / f"{worker_id}.log",
        },
    )


def on_signal(signum: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(signum).name)


def main() -> int:
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, on_signal)
    started = time.monotonic()
    try:
        check_before()
    except DemoFailed as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 1
    exit_code = 1
    with tempfile.TemporaryDirectory(prefix="rbee-demo-") as name:
        services = Services(Path(name))
        try:
            demo(services, Path(name))
            exit_code = 0
        except KeyboardInterrupt:
            print("\ndemo: interrupted", file=sys.stderr)
            exit_code = 130
        except (DemoFailed, OSError, ValueError) as exc:
            print(f"\ndemo failed: {exc}", file=sys.stderr)
        heading("The end")
        try:
            services.stop()
        except KeyboardInterrupt:
            exit_code = 130
        left = services.end_rest()
    if left:
        print(f"demo: {len(left)} processes had to be ended by force: {left}", file=sys.stderr)
        exit_code = exit_code or 1
    else:
        say("no process is left")
    if exit_code == 0:
        say(f"done in {time.monotonic() - started:.0f} s. To keep one running: .venv/bin/rbee up")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
