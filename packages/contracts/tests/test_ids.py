"""Ids: nothing that is a path, a line break or a flood gets through a pattern."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_contracts import ids
from rbee_contracts.ids import HiveId, JobId, ModelId, WorkerId
from rbee_contracts.sse import START, Position, parse_event_id, parse_firehose_id

HOSTILE = [
    *(
        "",
        " ",
        ".",
        "..",
        "../x",
        "a/../b",
        "/etc",
        "/etc/passwd",
        "~/x",
        "-rf",
        "a b",
        "a\\b",
        "a\x00",
        "\x00",
    ),
    *(
        "a\n",
        "a\r\n",
        "a\u2028",
        "é",
        "a\u0301",
        "１",
        "x" * 10_240,
        "a/b/c",
        "a@",
        "@a",
        "a//b",
        "a/",
        "a@b@c",
    ),
]


@pytest.mark.parametrize("kind", [ModelId, WorkerId, HiveId, JobId])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_ids_are_refused(kind: Any, text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, kind)


@pytest.mark.parametrize("text", ["rbee-tiny", "org/name", "org/name@v1.0", "name@main", "Qwen/Qwen2.5-0.5B"])
def test_model_ids_are_taken(text: str) -> None:
    assert msgspec.convert(text, ModelId) == text


@pytest.mark.parametrize("text", ["org/..", "../name", "org/name@..", "org/.git", "org/name@-x"])
def test_model_ids_cannot_point_elsewhere(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, ModelId)


@pytest.mark.parametrize("text", [*HOSTILE, "x" * 65, "a/b", "a:b"])
def test_hostile_correlation_ids_are_refused(text: str) -> None:
    taken_all_the_same = {".", "..", "-rf"}  # harmless: they are never a path or an argument

    assert ids.is_correlation_id(text) is (text in taken_all_the_same)


@pytest.mark.parametrize(
    "text", ["", "a b", "a\n", "é", "a\x00", "x" * 129, "x" * 10_240, "a\\b", 'a"', "a,b", "１"]
)
def test_hostile_idempotency_keys_are_refused(text: str) -> None:
    assert not ids.is_idempotency_key(text)


def test_new_ids_match_their_patterns_and_differ() -> None:
    job_ids = {msgspec.convert(ids.new_job_id(), JobId) for _ in range(100)}
    correlation_ids = {ids.new_correlation_id() for _ in range(100)}

    assert len(job_ids) == len(correlation_ids) == 100
    assert all(map(ids.is_correlation_id, correlation_ids))


@given(service=st.sampled_from(["hive", "worker"]), key=st.text())
def test_a_hop_job_id_is_the_same_every_time_and_matches_the_pattern(service: str, key: str) -> None:
    hop_id = ids.hop_job_id(service, key)

    assert hop_id == ids.hop_job_id(service, key)
    assert msgspec.convert(hop_id, JobId) == hop_id


def test_a_hop_job_id_does_not_change_between_versions() -> None:
    key = "job-00000000-0000-4000-8000-000000000000/infer/0"

    assert ids.hop_job_id("worker", key) == "job-0baa8286-e744-5100-b27a-0e9456ec7aed"


def test_a_hop_job_id_differs_by_service_job_step_and_attempt() -> None:
    root, other = ids.new_job_id(), ids.new_job_id()
    keys = [
        ids.step_key(root, "infer"),
        ids.step_key(root, "infer", 1),
        ids.step_key(root, "spawn"),
        ids.step_key(other, "infer"),
    ]

    assert len({ids.hop_job_id(service, key) for service in ("hive", "worker") for key in keys}) == 8


def test_step_keys_are_told_from_users_keys() -> None:
    assert ids.is_step_key(ids.step_key(ids.new_job_id(), "infer", 3))
    for key in (
        "",
        "order-17",
        "job-1/infer/0",
        "job-00000000-0000-4000-8000-000000000001/infer",
        "job-00000000-0000-4000-8000-000000000001/infer/0\n",
    ):
        assert not ids.is_step_key(key)
    assert ids.is_idempotency_key(ids.step_key(ids.new_job_id(), "s" * 64, 9999))


@given(n=st.integers(0, 10**15 - 1), i=st.integers(0, 10**15 - 1))
def test_event_ids_round_trip(n: int, i: int) -> None:
    assert parse_event_id(str(Position(n, i))) == (n, i)


def test_the_start_is_before_everything() -> None:
    assert parse_event_id("0-0") == START


@pytest.mark.parametrize(
    "text", ["", "1", "1-", "-1", "1-2-3", "1-2\n", " 1-2", "+1-2", "１-2", "1-0x2", "a-b", f"{10**15}-1"]
)
def test_malformed_event_ids_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not of the form"):
        parse_event_id(text)


@given(boot=st.text("0123456789abcdef", min_size=1, max_size=32), seq=st.integers(0, 10**15 - 1))
def test_firehose_ids_round_trip(boot: str, seq: int) -> None:
    assert parse_firehose_id(f"{boot}-{seq}") == (boot, seq)


@pytest.mark.parametrize(
    "text", ["", "ab", "ab-", "-1", "AB-1", "ab-1\n", "ab-1-2", "ab-１", "a" * 33 + "-1"]
)
def test_malformed_firehose_ids_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not of the form"):
        parse_firehose_id(text)
