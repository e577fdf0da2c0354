"""What every engine must do, run over each of them."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from msgspec import Struct

from rbee_contracts.errors import InvalidRequest
from rbee_contracts.events import InferResult
from rbee_contracts.nodes import EngineLoad
from rbee_contracts.operations import Infer
from rbee_worker.engine.base import Delta, Engine
from rbee_worker.engine.processes import OwnedProcesses
from rbee_worker.engine.sim import SimEngine, SimParameters
from rbee_worker.engine.vllm import VllmEngine

pytestmark = pytest.mark.anyio

MODEL = "test-model"
TINY = Path(os.environ.get("RBEE_TEST_MODEL") or Path(__file__).parents[4] / "models/rbee-tiny")


class Started(Struct, frozen=True):
    engine: Engine
    max_model_len: int


class Output(Struct, frozen=True):
    deltas: list[Delta]
    result: InferResult

    def text(self, choice: int = 0) -> str:
        return "".join(d.text for d in self.deltas if d.choice == choice)


async def run(engine: Engine, request_id: str = "test", **fields: Any) -> Output:
    """Run one request to its end and check the order of what comes."""
    async with aclosing(engine.generate(request_id, Infer(model=MODEL, **fields))) as stream:
        items = [item async for item in stream]
    *deltas, result = items
    assert isinstance(result, InferResult)
    assert all(isinstance(d, Delta) for d in deltas)
    return Output([d for d in deltas if isinstance(d, Delta)], result)


async def until_idle(engine: Engine) -> None:
    with anyio.fail_after(45):
        while engine.load().running or engine.load().waiting:  # noqa: ASYNC110
            await anyio.sleep(0.002)


async def is_seen_running(engine: Engine) -> bool:
    """Whether an engine tells of a request; not where it ended while this process stood still."""
    with anyio.move_on_after(5):
        while not engine.load().running:  # noqa: ASYNC110
            await anyio.sleep(0.002)
    return bool(engine.load().running)


class EngineContract:
    async def test_answers_a_probe_and_tells_of_its_pace(self, started: Started) -> None:
        await started.engine.probe()
        load = EngineLoad()
        # The rate is of the last five seconds: where this process stood still for as long, there is none.
        while not load.tokens_per_second:
            await run(started.engine, prompt="A worker", max_tokens=12, ignore_eos=True)
            await until_idle(started.engine)
            load = started.engine.load()

        assert load.step_age_s is not None
        assert load.step_age_s < 30
        assert load.prefix_cache_hit_rate is not None
        assert not started.engine.can_sleep, "neither was asked to be able to"

    async def test_gives_deltas_and_then_one_result(self, started: Started) -> None:
        output = await run(started.engine, prompt="A worker", max_tokens=12, ignore_eos=True)

        assert output.text()
        assert output.result.finish_reason == "length"
        assert output.result.choices == []

    async def test_counts_every_token(self, started: Started) -> None:
        output = await run(started.engine, prompt=[5, 6, 7, 8], max_tokens=12, ignore_eos=True)

        usage = output.result.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 12, 16)
        assert sum(len(d.token_ids) for d in output.deltas) <= 12

    async def test_tells_its_timings(self, started: Started) -> None:
        output = await run(started.engine, prompt="A hive", max_tokens=12, ignore_eos=True)

        t = output.result.timings
        assert t.ttft_ms >= t.prefill_ms > 0
        assert t.decode_ms > 0
        assert t.tokens_per_second == pytest.approx(11 / t.decode_ms * 1000, rel=0.01, abs=0.01)

    async def test_concurrent_requests_do_not_mix(self, started: Started) -> None:
        # The model knows these by heart: how an engine rounds in a larger batch does not change what follows.
        prompts = ["The queen holds", "The cancellation travels down", "Your client decides whether"]
        prompts += ["The message type stands", "You start one small", "The hive looks at"]
        fields: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "temperature": 0.0}
        alone = [(await run(started.engine, prompt=p, **fields)).text() for p in prompts]

        together = await asyncio.gather(
            *(run(started.engine, f"r{i}", prompt=p, **fields) for i, p in enumerate(prompts))
        )

        assert [output.text() for output in together] == alone

    async def test_the_same_request_id_twice_is_two_requests(self, started: Started) -> None:
        fields: dict[str, Any] = {"prompt": "A job", "ignore_eos": True}

        short, long = await asyncio.gather(
            run(started.engine, "same", max_tokens=5, **fields),
            run(started.engine, "same", max_tokens=9, **fields),
        )

        assert (short.result.usage.completion_tokens, long.result.usage.completion_tokens) == (5, 9)

    async def test_closing_the_generator_frees_the_engine(self, started: Started) -> None:
        op = Infer(model=MODEL, prompt="A job", max_tokens=started.max_model_len // 2, ignore_eos=True)
        with anyio.fail_after(45):
            while True:
                stream = started.engine.generate("test", op)
                await anext(stream)
                if await is_seen_running(started.engine):
                    break
                await stream.aclose()

        await stream.aclose()

        await until_idle(started.engine)
        assert started.engine.load().kv_cache_usage == 0

    async def test_cancelling_the_reader_frees_the_engine(self, started: Started) -> None:
        begun = anyio.Event()

        async def read() -> None:
            op = Infer(model=MODEL, prompt="A", max_tokens=started.max_model_len // 2, ignore_eos=True)
            async with aclosing(started.engine.generate("test", op)) as stream:
                async for _ in stream:
                    begun.set()

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await begun.wait()
            group.cancel_scope.cancel()

        await until_idle(started.engine)

    async def test_gives_what_is_left_of_the_context(self, started: Started) -> None:
        prompt = [7] * (started.max_model_len - 5)

        output = await run(started.engine, prompt=prompt, ignore_eos=True)

        assert output.result.usage.completion_tokens == 5

    @pytest.mark.parametrize("kind", ["tokens", "text", "messages"])
    async def test_refuses_a_prompt_that_fills_the_context(self, started: Started, kind: str) -> None:
        words = "word " * started.max_model_len * 2
        kinds: dict[str, dict[str, Any]] = {
            "tokens": {"prompt": [7] * started.max_model_len},
            "text": {"prompt": words},
            "messages": {"messages": [{"role": "user", "content": words}]},
        }

        with pytest.raises(InvalidRequest) as caught:
            await run(started.engine, **kinds[kind])

        assert caught.value.code == "context_length_exceeded"
        assert str(started.max_model_len) in caught.value.details

    async def test_refuses_more_output_than_the_context_holds(self, started: Started) -> None:
        with pytest.raises(InvalidRequest) as caught:
            await run(started.engine, prompt=[7] * 10, max_tokens=started.max_model_len - 9)

        assert caught.value.code == "context_length_exceeded"
        for number in (10, started.max_model_len - 9, started.max_model_len):
            assert str(number) in caught.value.details

    async def test_runs_several_choices(self, started: Started) -> None:
        output = await run(started.engine, prompt="A worker", n=2, seed=1, max_tokens=8, ignore_eos=True)

        assert output.text(0) != output.text(1)
        assert {d.choice for d in output.deltas} == {0, 1}
        assert [(e.choice, e.finish_reason) for e in output.result.choices] == [(0, "length"), (1, "length")]
        assert output.result.usage.completion_tokens == 16

    async def test_ends_at_a_stop_string_and_leaves_it_out(self, started: Started) -> None:
        fields: dict[str, Any] = {"prompt": "A worker", "max_tokens": 24, "temperature": 0.0}
        whole = (await run(started.engine, ignore_eos=True, **fields)).text()
        stop = whole[len(whole) // 2 : len(whole) // 2 + 3]

        output = await run(started.engine, ignore_eos=True, stop=[stop], **fields)

        assert output.text() == whole[: whole.index(stop)]
        assert (output.result.finish_reason, output.result.stop_reason) == ("stop", stop)
        await until_idle(started.engine)

    async def test_the_same_seed_gives_the_same_text(self, started: Started) -> None:
        fields: dict[str, Any] = {"prompt": "A worker", "max_tokens": 16, "temperature": 1.0}

        first, again, other = [
            (await run(started.engine, seed=seed, ignore_eos=True, **fields)).text() for seed in (1, 1, 2)
        ]

        assert first == again
        assert first != other

    async def test_takes_messages(self, started: Started) -> None:
        messages = [{"role": "user", "content": "What is a hive?"}]

        output = await run(started.engine, messages=messages, max_tokens=8, ignore_eos=True)

        assert output.result.usage.completion_tokens == 8

    @pytest.mark.parametrize(
        "fields",
        [
            {"messages": [{"content": "no role"}]},
            {"prompt": "A job", "min_tokens": 9, "max_tokens": 8},
            {"prompt": "A job", "thinking_token_budget": 3},
            {"prompt": "A job", "structured_outputs": {"regex": "("}},
            {"prompt": "A job", "structured_outputs": {"nonsense": 1}},
        ],
    )
    async def test_refuses_what_it_cannot_run(self, started: Started, fields: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequest):
            await run(started.engine, **fields)

        await until_idle(started.engine)

    async def test_has_an_app_with_vllms_metrics(self, started: Started) -> None:
        transport = httpx.ASGITransport(started.engine.http_app)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            answer = await client.post("/v1/chat/completions", json=body | {"ignore_eos": True})
            models = await client.get("/v1/models")
            metrics = await client.get("/metrics")

        assert answer.json()["usage"]["completion_tokens"] == 3
        assert [m["id"] for m in models.json()["data"]] == [MODEL]
        for name in (
            "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "generation_tokens_total",
            "prompt_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
        ):  # fmt: skip
            assert f'vllm:{name}{{engine="0",model_name="{MODEL}"}}' in metrics.text


class TestSimEngine(EngineContract):
    @pytest.fixture
    async def started(self) -> AsyncIterator[Started]:
        engine = SimEngine(MODEL, SimParameters(max_model_len=512, step_ms=0.5))
        info = await engine.start()
        yield Started(engine, info.max_model_len)
        await engine.stop()


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
class TestVllmEngine(EngineContract):
    @pytest.fixture(scope="class")
    async def started(self) -> AsyncIterator[Started]:
        if not (TINY / "config.json").exists():
            pytest.skip(f"no model in {TINY}")
        processes = OwnedProcesses()
        engine = VllmEngine(str(TINY), MODEL, [])
        info = await engine.start()
        assert info.engine == "vllm"
        yield Started(engine, info.max_model_len)
        await engine.stop()
        assert processes.kill() == []

    async def test_gives_logprobs_with_the_sampled_token_first(self, started: Started) -> None:
        fields: dict[str, Any] = {"prompt": "A worker", "max_tokens": 6, "temperature": 0.0}
        output = await run(started.engine, logprobs=2, ignore_eos=True, **fields)

        positions = [p for d in output.deltas for p in d.logprobs]
        assert [p[0].token_id for p in positions] == [t for d in output.deltas for t in d.token_ids]
        assert len(positions) == 6
        assert all(len(p) >= 2 and p[0].logprob >= p[1].logprob for p in positions)

    async def test_keeps_to_a_structure(self, started: Started) -> None:
        structure = {"choice": ["queen", "hive"]}
        output = await run(started.engine, prompt="A", max_tokens=12, structured_outputs=structure)

        assert output.text() in ("queen", "hive")

    async def test_honours_a_logit_bias(self, started: Started) -> None:
        bias = {"7": 100.0}
        output = await run(started.engine, prompt="A", max_tokens=3, logit_bias=bias, ignore_eos=True)

        assert {t for d in output.deltas for t in d.token_ids} == {7}

    @pytest.mark.parametrize(
        ("fields", "word"),
        [
            ({"structured_outputs": {"choice": ["a"], "colour": 1}}, "colour"),
            ({"repetition_detection": {"max_pattern_size": 2, "min_count": 1}}, "min_count"),
            ({"logit_bias": {"1000000": 1.0}}, "1000000"),
            ({"temperature": 50.0}, "temperature"),
            ({"priority": 1}, "priority"),
            ({"logprobs": 1000}, "1000"),
        ],
    )
    async def test_names_what_it_refuses(self, started: Started, fields: dict[str, Any], word: str) -> None:
        with pytest.raises(InvalidRequest, match=word):
            await run(started.engine, prompt="A job", max_tokens=3, **fields)
