"""How a real vLLM engine starts badly, dies and ends; each test has an engine of its own."""

import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
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
    pytest.mark.timeout(300),
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
    assert owned.kill() == []


def engine_cores(processes: OwnedProcesses) -> list[int]:
    processes.scan()
    alive = set(processes.alive())
    return [p.pid for p in multiprocessing.active_children() if p.pid in alive]


async def test_tells_of_its_death_and_ends_open_generators(model: str, processes: OwnedProcesses) -> None:
    engine = VllmEngine(model, "m", [])
    await engine.start()
    op = Infer(model="m", prompt="A job", max_tokens=400, ignore_eos=True)
    deaths: list[tuple[str, float]] = []
    errors: list[float] = []

    async def watch() -> None:
        deaths.append((await engine.died(), time.monotonic()))

    async def read() -> None:
        with pytest.raises(EngineDied):
            await read_on(engine.generate("r", op))
        errors.append(time.monotonic())

    stream: Any = engine.generate("first", op)
    assert isinstance(await anext(stream), Delta)
    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        group.start_soon(read)
        while engine.load().running < 2:  # noqa: ASYNC110
            await anyio.sleep(0.002)
        (pid,) = engine_cores(processes)
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)

    cause, told = deaths[0]
    assert cause == f"engine process EngineCore (pid {pid}) has ended"
    # Promised within 0.25 s; this machine may be busy, so how often it is looked for stands for that.
    assert vllm._DEATH_POLL_S < 0.25
    assert told - killed < 2
    assert errors[0] - killed < 2
    with pytest.raises(EngineDied):
        await read_on(stream)
    with pytest.raises(EngineDied):
        await read_on(engine.generate("late", op))
    await engine.stop()


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

    with anyio.fail_after(10):
        cause = await engine.died()

    assert cause == f"engine process EngineCore (pid {pid}) has ended"
    transport = httpx.ASGITransport(engine.http_app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        with anyio.fail_after(20):
            while (await client.get("/health")).status_code != 503:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        body = {"model": "m", "prompt": "A job", "max_tokens": 3}
        assert (await client.post("/v1/completions", json=body)).status_code >= 500
    await engine.stop()


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
