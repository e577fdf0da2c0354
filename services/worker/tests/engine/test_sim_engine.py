"""The simulated engine as a whole: its loop, its faults and its HTTP app on a real port."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
import uvicorn

from rbee_contracts.errors import Unavailable
from rbee_contracts.operations import Infer
from rbee_worker.engine.base import Delta, EngineDied, EngineStartFailed
from rbee_worker.engine.sim import SimEngine, SimParameters

pytestmark = pytest.mark.anyio


def infer(**fields: Any) -> Infer:
    values: dict[str, Any] = {"prompt": "Hello", "ignore_eos": True}
    return Infer(model="sim", **(values | fields))


@asynccontextmanager
async def running(**parameters: Any) -> AsyncIterator[SimEngine]:
    values: dict[str, Any] = {"step_ms": 0.5}
    engine = SimEngine("sim", SimParameters(**(values | parameters)))
    await engine.start()
    yield engine
    await engine.stop()


async def read(engine: SimEngine, op: Infer) -> list[Any]:
    async with aclosing(engine.generate("test", op)) as stream:
        return [item async for item in stream]


async def test_a_step_reaches_all_its_readers_in_one_iteration_of_the_loop() -> None:
    iteration = 0
    is_over = False
    seen: dict[int, list[int]] = {}
    loop = asyncio.get_running_loop()

    def tick() -> None:
        nonlocal iteration
        iteration += 1
        if not is_over:
            loop.call_soon(tick)

    async def reader(number: int) -> None:
        async for item in engine.generate(f"r{number}", infer(prompt=f"p{number}", max_tokens=10)):
            if isinstance(item, Delta):
                seen.setdefault(number, []).append(iteration)

    async with running() as engine:
        tick()
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(reader, number)
    is_over = True

    assert len(seen) == 20
    assert {tuple(iterations) for iterations in seen.values()} == {tuple(seen[0])}
    assert len(set(seen[0])) == 10


async def test_ends_by_itself_unless_told_to_go_on() -> None:
    async with running(eos_after_tokens=5) as engine:
        *_, short = await read(engine, infer(ignore_eos=None))
        *_, long = await read(engine, infer(max_tokens=8))

    assert (short.usage.completion_tokens, short.finish_reason) == (5, "stop")
    assert (long.usage.completion_tokens, long.finish_reason) == (8, "length")


async def test_dies_when_told_to() -> None:
    async with running(crash_after_tokens=10) as engine:
        stream = engine.generate("test", infer(max_tokens=50))
        for _ in range(10):
            assert isinstance(await anext(stream), Delta)
        with pytest.raises(EngineDied):
            await anext(stream)
        with anyio.fail_after(45):
            cause = await engine.died()
        with pytest.raises(EngineDied):
            await read(engine, infer(max_tokens=1))

    assert "10 tokens" in cause


async def test_stalls_when_told_to() -> None:
    async with running(stall_after_tokens=10) as engine:
        stream = engine.generate("test", infer(max_tokens=50))
        for _ in range(10):
            await anext(stream)
        assert engine.load().running == 1
        with anyio.move_on_after(0.05) as waited:
            await anext(stream)

        assert waited.cancelled_caught
        assert engine.is_alive
        assert engine.load().running == 0


async def test_a_stop_ends_what_runs() -> None:
    async with running() as engine:
        stream = engine.generate("test", infer(max_tokens=5000))
        await anext(stream)
        await engine.stop()
        with pytest.raises(EngineDied):
            async for _ in stream:
                pass
        with pytest.raises(Unavailable):
            await read(engine, infer())


async def test_fails_its_start_when_told_to() -> None:
    engine = SimEngine("sim", SimParameters(fail_start=True))

    with pytest.raises(EngineStartFailed):
        await engine.start()
    assert engine.http_app is None


@asynccontextmanager
async def serving(**parameters: Any) -> AsyncIterator[tuple[SimEngine, httpx.AsyncClient]]:
    async with running(**parameters) as engine:
        config = uvicorn.Config(engine.http_app, port=0, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve)
            while not server.started:  # noqa: ASYNC110
                await anyio.sleep(0.005)
            port = server.servers[0].sockets[0].getsockname()[1]
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=45) as client:
                yield engine, client
            server.should_exit = True


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True} | fields


async def test_streams_chat_chunks() -> None:
    body = chat(stream=True, max_tokens=4, n=2, stream_options={"include_usage": True})
    async with serving() as (_, client):
        answer = await client.post("/v1/chat/completions", json=body)

    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = answer.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    *chunks, usage = [json.loads(event.removeprefix("data: ")) for event in events]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    choices = [chunk["choices"][0] for chunk in chunks]
    for index in (0, 1):
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert sum("tok" in choice["delta"].get("content", "") for choice in mine) == 4
        assert mine[-1]["finish_reason"] == "length"


async def test_a_step_of_a_stream_is_one_write() -> None:
    sent: list[dict[str, Any]] = []
    async with running() as engine:
        body = json.dumps(chat(stream=True, max_tokens=5, n=3)).encode()
        given = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not given.is_set():
                given.set()
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        path = "/v1/chat/completions"
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [], "http_version": "1.1", "scheme": "http", "server": ("sim", 80), "root_path": "",
        }  # fmt: skip
        await engine.http_app(scope, receive, send)

    assert len(sent) == 1 + 5
    assert [message.get("more_body") for message in sent[1:]] == [True] * 4 + [False]


async def test_a_client_that_leaves_frees_the_engine() -> None:
    async with serving(step_ms=20.0) as (engine, client):  # by itself it would take minutes
        body = chat(stream=True, max_tokens=20_000)
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            await anext(answer.aiter_lines())
            assert engine.load().running == 1
        with anyio.fail_after(45):
            while engine.load().running:  # noqa: ASYNC110
                await anyio.sleep(0.002)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"model": "other"}, 404),
        ({"messages": "none"}, 400),
        ({"messages": [{"role": "user"}]}, 400),
        ({"max_tokens": 10**6}, 400),
        ({"n": 0}, 400),
        ({"logprobs": True}, 400),
    ],
)
async def test_refuses_a_bad_chat_request(changes: dict[str, Any], status: int) -> None:
    async with serving() as (_, client):
        answer = await client.post("/v1/chat/completions", json=chat(**changes))

    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status


@pytest.mark.parametrize("stream", [False, True])
async def test_tells_http_clients_of_its_death(stream: bool) -> None:
    async with serving(crash_after_tokens=3) as (_, client):
        answer = await client.post("/v1/chat/completions", json=chat(stream=stream, max_tokens=9))
        health = await client.get("/health")

    assert health.status_code == 503
    if stream:
        *_, error, done = answer.text.removesuffix("\n\n").split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 500
        assert done == "data: [DONE]"
    else:
        assert answer.status_code == 500
