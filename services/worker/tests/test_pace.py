"""How fast an engine goes, by its steps; and what its requests add to that."""

from types import SimpleNamespace

import anyio
import pytest

from rbee_contracts.nodes import EngineLoad
from rbee_worker.activity import Activity
from rbee_worker.engine import vllm_output
from rbee_worker.engine.pace import Pace
from rbee_worker.engine.vllm_output import LoadRecorder


def test_the_rate_is_over_the_last_five_seconds() -> None:
    pace = Pace()
    for step in range(100):
        pace.step(step / 10, 10)

    assert pace.tokens_per_second(9.95) == pytest.approx(100, rel=0.05)
    assert pace.tokens_per_second(12.4) == pytest.approx(50, rel=0.1)
    assert pace.tokens_per_second(20.0) == 0


def test_many_steps_take_little_room() -> None:
    pace = Pace()
    for step in range(100_000):
        pace.step(step / 1000, 1)

    assert len(pace._bins) < 100


def test_the_age_of_the_last_step() -> None:
    pace = Pace()
    assert pace.step_age_s(5) is None
    pace.step(5, 0)
    assert pace.step_age_s(7.25) == 2.25
    assert pace.step_age_s(4) == 0
    assert pace.tokens_per_second(5) == 0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_requests_that_the_engine_has_not_seen_wait() -> None:
    clock = Clock()
    activity = Activity(clock)
    begun, over = anyio.Event(), anyio.Event()

    async def handler(op: str, context: object) -> str:
        begun.set()
        await over.wait()
        return op

    async def call() -> None:
        assert await activity.counting(handler)("op", None) == "op"  # type: ignore[arg-type]

    idle = EngineLoad(step_age_s=900.0)
    assert activity.complete(idle) == idle
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        await begun.wait()
        tasks.start_soon(call)
        clock.now += 3
        await anyio.wait_all_tasks_blocked()

        assert activity.count == 2
        assert activity.complete(idle) == EngineLoad(waiting=2, step_age_s=3.0)
        assert activity.complete(EngineLoad()) == EngineLoad(waiting=2, step_age_s=3.0)
        seen = EngineLoad(running=2, step_age_s=0.5)
        assert activity.complete(seen) == seen
        over.set()
    assert activity.count == 0


class Prefix:
    def __init__(self, queries: int, hits: int) -> None:
        self.queries, self.hits = queries, hits


class SchedulerStats:
    """vLLM's, as far as it is read."""

    num_running_reqs = 2
    num_waiting_reqs = 1
    num_skipped_waiting_reqs = 3
    kv_cache_usage = 0.5

    def __init__(self, prefix: Prefix | None) -> None:
        self.prefix_cache_stats = prefix


class IterationStats:
    num_generation_tokens = 7


def test_vllms_numbers_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_output, "time", SimpleNamespace(monotonic=Clock()))
    recorder = LoadRecorder()
    assert recorder.total() == EngineLoad()
    recorder.record(SchedulerStats(Prefix(100, 25)), IterationStats())
    recorder.record(SchedulerStats(Prefix(100, 75)), None)
    recorder.record(None, IterationStats())
    recorder.record(SchedulerStats(None), IterationStats(), engine_idx=1)
    load = recorder.total()

    assert (load.running, load.waiting, load.kv_cache_usage) == (4, 8, 0.5)
    assert load.prefix_cache_hit_rate == 0.5
    assert load.tokens_per_second == pytest.approx(21 / 5)
    assert load.step_age_s == 0


def test_output_without_statistics_is_a_step_too() -> None:
    recorder = LoadRecorder()
    recorder.stepped()

    assert recorder.total().step_age_s is not None
