"""How a real vLLM engine starts badly, dies and ends; each test has an engine of its own."""

import math
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest

from rbee_contracts.errors import InvalidRequest
from rbee_contracts.events import InferResult
from rbee_contracts.operations import Infer
from rbee_worker.engine import vllm
from rbee_worker.engine.base import Delta, EngineDied, EngineStartFailed
from rbee_worker.engine.processes import OwnedProcesses
from rbee_worker.engine.vllm import VllmEngine

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
]

TINY = Path(os.environ.get("RBEE_TEST_MODEL") or Path(__file__).parents[4] / "models/rbee-tiny")


@pytest.fixture
def model() -> str:
    if not (TINY / "config.json").exists():
        pytest.skip(f"no model in {TINY}")
    return str(TINY)


@pytest.fixture
async def processes() -> AsyncIterator[OwnedProcesses]:
    """The processes the test leaves: none."""
    owned = OwnedProcesses()
    yield owned
    # A start that was cancelled goes on importing for a while, and vLLM runs short commands meanwhile.
    while any(thread.name == "vllm-engine" for thread in threading.enumerate()):  # noqa: ASYNC110
        await anyio.sleep(0.02)
    assert owned.kill() == []


def engine_cores(processes: OwnedProcesses) -> list[int]:
    processes.scan()
    alive = set(processes.alive())
    return [p.pid for p in multiprocessing.active_children() if p.pid in alive]


@pytest.mark.timeout(1800)
async def test_tells_of_its_death_and_ends_open_generators(model: str, processes: OwnedProcesses) -> None:
    # Promised within 0.3 s; this machine may be busy, so how often it is looked for stands for that.
    assert vllm._DEATH_POLL_S + vllm._CAUSE_S < 0.3
    # What holds this process up delays one death; what is slow by itself is slow each time.
    for _ in range(3):
        if await _longest_wait_for_a_death(model, processes) < 2:
            return
    raise AssertionError("its death was told late three times")


async def _longest_wait_for_a_death(model: str, processes: OwnedProcesses) -> float:
    """Kill an engine that generates; give how long it took until all who wait for it knew, in seconds."""
    engine = VllmEngine(model, "m", [])
    info = await engine.start()
    op = Infer(model="m", prompt="A job", max_tokens=info.max_model_len - 50, ignore_eos=True)
    deaths: list[tuple[str, float]] = []
    errors: list[float] = []

    async def watch() -> None:
        deaths.append((await engine.died(), time.monotonic()))

    async def read() -> None:
        try:
            await read_on(engine.generate("r", op))
        except EngineDied:
            errors.append(time.monotonic())

    stream: Any = engine.generate("first", op)
    assert isinstance(await anext(stream), Delta)
    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        group.start_soon(read)
        with anyio.move_on_after(60) as limit:
            while engine.load().running < 2:  # noqa: ASYNC110
                await anyio.sleep(0.002)
        (pid,) = engine_cores(processes)
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)

    if limit.cancelled_caught:  # this process stood still for as long as the engine generates
        await engine.stop()
        return math.inf
    cause, told = deaths[0]
    assert cause == f"engine process EngineCore (pid {pid}) has ended"
    with pytest.raises(EngineDied):
        await read_on(stream)
    with pytest.raises(EngineDied):
        await read_on(engine.generate("late", op))
    await engine.stop()
    (failed,) = errors
    return max(told, failed) - killed


async def read_on(stream: Any) -> InferResult | None:
    last = None
    async for item in stream:
        last = item
    return last


async def test_tells_of_its_death_when_idle(model: str, processes: OwnedProcesses) -> None:
    engine = VllmEngine(model, "m", [])
    await engine.start()
    (pid,) = engine_cores(processes)
    os.kill(pid, signal.SIGKILL)

    with anyio.fail_after(60):
        cause = await engine.died()

    assert cause == f"engine process EngineCore (pid {pid}) has ended"
    transport = httpx.ASGITransport(engine.http_app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        with anyio.fail_after(60):
            while (await client.get("/health")).status_code != 503:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        body = {"model": "m", "prompt": "A job", "max_tokens": 3}
        assert (await client.post("/v1/completions", json=body)).status_code >= 500
    await engine.stop()


@pytest.fixture
def ended_process() -> Iterator[int]:
    """The pid of a process that has ended, and that nobody has waited for yet."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield process.pid


async def test_names_the_process_also_where_vllm_has_noticed_its_death_first(ended_process: int) -> None:
    engine = VllmEngine("model", "m", [])
    engine._cores = [SimpleNamespace(name="EngineCore", pid=ended_process)]
    engine._engine = SimpleNamespace(errored=True)

    assert await engine.died() == f"engine process EngineCore (pid {ended_process}) has ended"


@pytest.mark.parametrize("children", [0, 1], ids=["while importing", "while its core starts"])
async def test_a_cancelled_start_leaves_no_process(
    model: str, processes: OwnedProcesses, children: int
) -> None:
    engine = VllmEngine(model, "m", [])
    async with anyio.create_task_group() as group:
        group.start_soon(engine.start)
        with anyio.fail_after(120):
            while True:
                await anyio.sleep(0.1)
                if len(engine_cores(processes)) >= children:
                    break
        group.cancel_scope.cancel()

    assert processes.alive() == []


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--max-model-len", "many"], "max-model-len"),
        (["--max-model-len", "100000000"], "max_model_len"),
        (["--api-key", "secret"], "--api-key"),
        (["stray"], "stray"),
    ],
)
async def test_refuses_a_bad_argument_in_one_line(
    model: str, processes: OwnedProcesses, argument: list[str], words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await VllmEngine(model, "m", argument).start()

    assert words in caught.value.details
    assert "\n" not in caught.value.details


async def test_a_model_that_cannot_be_loaded_fails_the_start(
    model: str, processes: OwnedProcesses, tmp_path: Path
) -> None:
    for file in Path(model).iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    # A valid file with no tensor in it: found out by the engine core, not by this process.
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")

    with pytest.raises(EngineStartFailed, match="cannot load model"):
        await VllmEngine(str(tmp_path), "m", []).start()
