"""The simulated scheduler, step by step: no clock, no event loop."""

import argparse

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_worker.engine.sim import SimParameters, add_arguments, from_args
from rbee_worker.engine.sim.model import Emission, SimModel, SimSequence
from rbee_worker.engine.sim.text import EOS, Text, count_tokens, hash_prompt


def parameters(**changes: float) -> SimParameters:
    """An engine with easy numbers: 10 ms a step, 1 ms a sequence, 1 ms a prompt token, 32 blocks of 4."""
    values: dict[str, float] = {
        "step_ms": 10.0, "step_ms_per_seq": 1.0, "prefill_tokens_per_s": 1000.0, "max_num_seqs": 8,
        "max_num_batched_tokens": 64, "max_model_len": 128, "block_tokens": 4, "kv_blocks": 32,
    }  # fmt: skip
    return msgspec.convert(values | changes, SimParameters)


def sequence(prompt: list[int], max_tokens: int = 4) -> SimSequence:
    hashes, seed = hash_prompt(prompt, 4)
    return SimSequence(
        prompt_tokens=len(prompt), block_hashes=hashes, text=Text(seed=seed, max_tokens=max_tokens)
    )


def step(model: SimModel, now: float = 0.0) -> tuple[float, list[Emission]]:
    duration_s = model.plan(now)
    assert duration_s is not None
    return round(duration_s * 1000, 6), model.finish(now + duration_s)


def run_out(model: SimModel) -> int:
    steps = 0
    while model.plan(0.0) is not None:
        model.finish(0.0)
        steps += 1
        assert steps < 10_000
    return steps


def test_a_step_lasts_longer_with_each_sequence_in_it() -> None:
    model = SimModel(parameters())
    durations = []
    for first in range(4):
        model.add(sequence([first], max_tokens=20))
        step(model)
        durations.append(step(model)[0])

    assert durations == [11.0, 12.0, 13.0, 14.0]


def test_all_sequences_of_a_step_get_their_token_together() -> None:
    model = SimModel(parameters())
    sequences = [sequence([i]) for i in range(3)]
    for each in sequences:
        model.add(each)

    _, emissions = step(model)

    assert [e.sequence for e in emissions] == sequences


def test_a_long_prompt_is_prefilled_in_chunks_beside_the_decodes() -> None:
    model = SimModel(parameters(max_num_batched_tokens=41, kv_blocks=64))
    model.add(sequence([1], max_tokens=50))
    step(model)
    model.add(sequence(list(range(100)), max_tokens=5))

    steps = [step(model) for _ in range(4)]

    # 40 + 40 + 20 prompt tokens, as one token of each step goes to the sequence that decodes.
    assert [duration for duration, _ in steps] == [51.0, 51.0, 32.0, 12.0]
    assert [len(emissions) for _, emissions in steps] == [1, 1, 2, 2]


def test_a_sequence_waits_until_the_cache_has_room_for_all_of_it() -> None:
    model = SimModel(parameters())
    first, second, third = (sequence([i] * 60, max_tokens=20) for i in range(3))
    for each in (first, second, third):
        model.add(each)

    step(model)

    assert list(model.running.values()) == [first]
    assert list(model.waiting) == [second, third]
    assert model.kv_cache_usage == 20 / 32

    while first.generated < 20:
        step(model)
    step(model)

    assert list(model.running.values()) == [second]


def test_no_more_sequences_run_than_allowed() -> None:
    model = SimModel(parameters(max_num_seqs=2))
    for first in range(5):
        model.add(sequence([first]))

    step(model)

    assert (len(model.running), len(model.waiting)) == (2, 3)


def test_a_known_prefix_is_not_computed_again() -> None:
    model = SimModel(parameters())
    prompt = list(range(40))
    durations = []
    for last in ([100], [200], [300, 301, 302, 303]):
        model.add(sequence(prompt + last, max_tokens=1))
        durations.append(step(model)[0])

    assert durations == [52.0, 12.0, 15.0]
    assert (model.counters.prefix_queries, model.counters.prefix_hits) == (41 + 41 + 44, 80)


def test_the_last_prompt_token_is_always_computed() -> None:
    model = SimModel(parameters())
    for expected_ms in (51.0, 15.0):
        model.add(sequence(list(range(40)), max_tokens=1))
        assert step(model)[0] == expected_ms


def test_without_prefix_caching_every_prompt_is_computed() -> None:
    model = SimModel(parameters(prefix_caching=False))
    for _ in range(2):
        model.add(sequence(list(range(40)), max_tokens=1))
        assert step(model)[0] == 51.0
    assert model.counters.prefix_queries == 0


def test_the_least_recently_used_prefix_is_evicted() -> None:
    model = SimModel(parameters())
    old, young = list(range(48)), list(range(100, 148))
    for prompt in (old, young, [200] * 60):
        model.add(sequence(prompt, max_tokens=1))
        run_out(model)

    hits = [model.cache.hits(hash_prompt(prompt, 4)[0]) for prompt in (old, young)]

    assert hits[0] < 12
    assert hits[1] == 12


def test_an_aborted_sequence_leaves_nothing_behind() -> None:
    model = SimModel(parameters())
    running, waiting = sequence([1] * 100), sequence([2] * 100)
    model.add(running)
    model.add(waiting)
    model.plan(0.0)

    model.abort(running)
    model.abort(waiting)
    model.abort(waiting)

    assert model.finish(0.0) == []
    assert model.plan(0.0) is None
    assert model.cache.used == 0


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 100), st.integers(1, 28), st.integers(0, 3), st.booleans()),
        min_size=1, max_size=30,
    )
)  # fmt: skip
def test_every_sequence_ends_and_the_cache_is_never_overdrawn(
    requests: list[tuple[int, int, int, bool]],
) -> None:
    model = SimModel(parameters())
    kept = []
    for prompt_tokens, max_tokens, family, is_aborted in requests:
        each = sequence([family] * prompt_tokens, max_tokens)
        model.add(each)
        if model.plan(0.0) is not None:
            assert model.cache.used <= 32
            if is_aborted:
                model.abort(each)
            model.finish(0.0)
        if not is_aborted:
            kept.append((each, max_tokens))

    run_out(model)

    assert all(each.generated == max_tokens for each, max_tokens in kept)
    assert model.cache.used == 0


def read(text: Text) -> tuple[str, list[int], str | None, int | str | None]:
    parts, ids = [], []
    while True:
        part, token_id, finish_reason, stop_reason = text.next()
        parts.append(part)
        ids.append(token_id)
        if finish_reason is not None:
            return "".join(parts), ids, finish_reason, stop_reason


def test_text_is_as_long_as_asked_and_the_same_each_time() -> None:
    assert read(Text(seed=1, max_tokens=3)) == (" tok2 tok3 tok4", [2, 3, 4], "length", None)
    assert read(Text(seed=1, max_tokens=3)) == read(Text(seed=1, max_tokens=3))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stop": ["tok4"]}, (" tok2 tok3 ", "stop", "tok4")),
        ({"stop": ["3 to"]}, (" tok2 tok", "stop", "3 to")),
        ({"stop": ["3 to"], "keep_stop": True}, (" tok2 tok3 to", "stop", "3 to")),
        ({"stop": ["absent"]}, (" tok2 tok3 tok4 tok5 tok6", "length", None)),
        ({"stop_token_ids": [3]}, (" tok2 tok3", "stop", 3)),
        ({"stop_token_ids": [3], "min_tokens": 2}, (" tok2 tok3 tok4 tok5 tok6", "length", None)),
        ({"eos_after": 3}, (" tok2 tok3", "stop", None)),
        ({"eos_after": 3, "min_tokens": 3}, (" tok2 tok3 tok4", "stop", None)),
    ],
)
def test_text_ends_where_it_is_told_to(
    options: dict[str, object], expected: tuple[str, str, int | str | None]
) -> None:
    text, _, finish_reason, stop_reason = read(Text(seed=1, max_tokens=5, **options))  # type: ignore[arg-type]

    assert (text, finish_reason, stop_reason) == expected


def test_the_end_of_a_text_is_a_token_without_text() -> None:
    assert read(Text(seed=1, max_tokens=9, eos_after=2)) == (" tok2", [2, EOS], "stop", None)


def test_prompts_share_the_blocks_of_their_common_beginning() -> None:
    one, two = "a" * 64 + "b" * 64, "a" * 64 + "c" * 64

    (a, b), (c, d) = hash_prompt(one, 16)[0], hash_prompt(two, 16)[0]

    assert a == c
    assert b != d
    assert count_tokens(one) == 32


def test_every_parameter_is_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    assert from_args(parser.parse_args([])) == SimParameters()
    flags = ["--sim-step-ms", "2.5", "--sim-kv-blocks", "9000", "--no-sim-prefix-caching", "--sim-fail-start"]
    assert from_args(parser.parse_args([*flags, "--sim-crash-after-tokens", "7"])) == SimParameters(
        step_ms=2.5, kv_blocks=9000, prefix_caching=False, fail_start=True, crash_after_tokens=7
    )
    assert "40 % of the peak" in parser.format_help()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--sim-step-ms", "0"], "step_ms"),
        (["--sim-step-ms", "fast"], "step_ms"),
        (["--sim-kv-blocks", "10"], "max_model_len"),
        (["--sim-max-num-batched-tokens", "10"], "max_num_batched_tokens"),
    ],
)
def test_a_bad_flag_is_named(flags: list[str], word: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    with pytest.raises(ValueError, match=word):
        from_args(parser.parse_args(flags))
