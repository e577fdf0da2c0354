"""What every `JobStore` does, whatever it keeps things in."""

from collections.abc import Callable
from typing import TypeAlias

import msgspec
import pytest
from rbee_records import accepted, at, ended, job_id, narrated, spoke, started, step, whole_job

from rbee_contracts.events import Usage
from rbee_contracts.jobs import JobError, JobRecord
from rbee_contracts.operations import decode_operation
from rbee_queen.store import (
    HiveForgotten,
    HiveSeen,
    JobStore,
    Record,
    StoredEvent,
    StoredHive,
    StoredStep,
    StoreFailed,
)
from rbee_queen.store.base import FORGET_AT_ONCE
from rbee_queen.store.schema import REVISION

MakeStore: TypeAlias = Callable[..., JobStore]


@pytest.fixture
def store(make_store: MakeStore) -> JobStore:
    return make_store()


def seqs(store: JobStore) -> list[int]:
    page = store.page(state=None, operation=None, limit=1000, before_seq=None)
    return [int(job.correlation_id.removeprefix("corr-")) for job in page.jobs]


def everything(store: JobStore) -> object:
    return store.unfinished(), store.finished_since(""), store.hives(), store.last_seq()


def test_an_empty_store_gives_nothing(store: JobStore) -> None:
    assert (store.hives(), store.unfinished(), store.finished_since("")) == ([], [], [])
    assert store.last_seq() == 0
    assert store.get(job_id(1)) is None
    assert store.page(state=None, operation=None, limit=5, before_seq=None).jobs == []
    assert store.forget(finished_before=at(80_000), keep=0) == 0


def test_an_unfinished_job_is_given_back_whole(store: JobStore) -> None:
    job = accepted(7, key="a-key")
    store.write(
        [
            job,
            started(7),
            narrated(7, 1, body=b'{"message":"\xc3\xa4 \\u0000"}'),
            step(7),
            step(7, 1),
            narrated(7, 2, i=3, lower_n=5),
            spoke(7),
        ]
    )

    (found,) = store.unfinished()

    given = msgspec.structs.asdict(found.accepted)
    expected = msgspec.structs.asdict(job)
    assert msgspec.json.decode(given.pop("operation")) == msgspec.json.decode(expected.pop("operation"))
    assert given == expected
    assert (found.state, found.started_at, found.finished_at) == ("running", at(8), None)
    assert found.has_spoken is True
    assert (found.error, found.usage, found.result) == (None, None, None)
    assert found.events == [
        StoredEvent(n=1, i=0, body=b'{"message":"\xc3\xa4 \\u0000"}', lower_n=None),
        StoredEvent(n=2, i=3, body=b"{}", lower_n=5),
    ]
    assert found.steps == [
        StoredStep(step="infer", attempt=a, hive_id=f"hive-{a}", lower_job_id=step(7, a).lower_job_id)
        for a in (0, 1)
    ]


def test_a_job_that_nobody_has_started_is_pending(store: JobStore) -> None:
    store.write([accepted(1)])

    (found,) = store.unfinished()

    assert (found.state, found.started_at, found.has_spoken) == ("pending", None, False)
    assert found.accepted.starts_at_once is False
    assert (found.accepted.resume_window_s, found.accepted.timeout_s) == (2.5, 0.1)


def test_a_finished_job_is_given_with_its_terminal_event_last(store: JobStore) -> None:
    store.write(whole_job(1))

    (found,) = store.finished_since("")

    assert store.unfinished() == []
    assert (found.state, found.finished_at) == ("completed", at(3))
    assert found.events[-1] == StoredEvent(n=3, i=4, body=b'{"action":"execute_complete"}', lower_n=None)
    assert [event.n for event in found.events] == [1, 2, 3]
    assert found.result == b'{"finish_reason":"stop"}'


def test_ended_jobs_are_given_as_far_as_there_is_room_the_newest_first(store: JobStore) -> None:
    for seq in range(1, 6):
        store.write(whole_job(seq))
    size = len(b"{}{}" + b'{"action":"execute_complete"}' + b'{"finish_reason":"stop"}')

    def found(max_bytes: int, since: str = "") -> list[int]:
        return [job.accepted.seq for job in store.finished_since(since, max_bytes=max_bytes)]

    assert found(5 * size) == [1, 2, 3, 4, 5]
    assert found(5 * size - 1) == [2, 3, 4, 5]
    assert found(size) == [5]
    assert found(size - 1) == []
    assert found(5 * size, since=at(6)) == [4, 5]
    assert store.get(job_id(1)) is not None


def test_a_check_writes_and_changes_nothing(store: JobStore) -> None:
    store.write(whole_job(1))
    before = everything(store)

    states = [store.check() for _ in range(2)]

    assert everything(store) == before
    assert states[0] == states[1]
    assert states[0].revision == states[0].newest == REVISION
    assert states[0].kind in ("memory", "SQLite", "PostgreSQL")
    assert states[0].version[0].isdigit()
    assert (states[0].folder is not None) == (states[0].kind == "SQLite")
    store.close()
    with pytest.raises(StoreFailed, match="not open"):
        store.check()


def test_records_may_come_in_one_write_or_in_many(make_store: MakeStore) -> None:
    records = [record for seq in range(1, 4) for record in whole_job(seq)][:-1]
    at_once, one_by_one = make_store(), make_store()
    at_once.write(records)

    for record in records:
        one_by_one.write([record])

    assert everything(one_by_one) == everything(at_once)


@pytest.mark.parametrize("part", [slice(None), slice(0, 1), slice(1, 2), slice(2, 6), slice(6, 7)])
def test_writing_records_again_changes_nothing(store: JobStore, part: slice) -> None:
    records: list[Record] = [*whole_job(1), *whole_job(2)[:-1], HiveSeen(hive_id="h", url="u", boot="b")]
    store.write(records)
    expected = everything(store)

    store.write(records[part])

    assert everything(store) == expected


def test_the_first_end_counts(store: JobStore) -> None:
    store.write([accepted(1), ended(1)])
    expected = everything(store)

    store.write([ended(1, state="cancelled", n=10), narrated(1, 11), step(1), started(1), spoke(1)])

    assert everything(store) == expected


def test_records_of_an_unknown_job_are_passed_over(store: JobStore) -> None:
    store.write([*whole_job(5)[1:], accepted(6)])

    assert seqs(store) == [6]


def test_a_write_that_fails_writes_nothing(store: JobStore) -> None:
    store.write([accepted(1)])
    other = msgspec.structs.replace(accepted(2), seq=1)

    with pytest.raises(StoreFailed) as failed:
        store.write([accepted(3), narrated(1, 1), other])

    assert seqs(store) == [1]
    assert store.unfinished()[0].events == []
    assert "prompt" not in str(failed.value)
    store.write([accepted(2)])
    assert seqs(store) == [2, 1]


@pytest.mark.parametrize(
    ("operation", "erased"),
    [
        ({"operation": "infer", "model": "m", "prompt": "secret", "n": 2}, {"prompt": ""}),
        ({"operation": "infer", "model": "m", "prompt": [1, 2, 3]}, {"prompt": ""}),
        (
            {"operation": "infer", "model": "m", "messages": [{"role": "user", "content": "secret"}]},
            {"messages": [{}]},
        ),
        (
            {"operation": "openai", "endpoint": "/v1/embeddings", "body": {"model": "m", "input": "secret"}},
            {"body": {}},
        ),
        ({"operation": "worker_spawn", "model": "m", "device": 1}, {}),
    ],
)
def test_the_end_erases_what_was_asked(
    store: JobStore, operation: dict[str, object], erased: dict[str, object]
) -> None:
    store.write([accepted(1, operation=operation)])
    (before,) = store.unfinished()
    store.write([ended(1)])
    (after,) = store.finished_since("")

    assert msgspec.json.decode(before.accepted.operation) == operation
    assert msgspec.json.decode(after.accepted.operation) == operation | erased
    assert decode_operation(after.accepted.operation).name == operation["operation"]


def test_payloads_are_kept_where_asked_for(make_store: MakeStore) -> None:
    store = make_store(store_payloads=True)
    store.write(whole_job(1))

    (found,) = store.finished_since("")

    assert msgspec.json.decode(found.accepted.operation)["prompt"] == "prompt 1"


def test_a_digest_is_kept_only_with_an_idempotency_key(store: JobStore) -> None:
    store.write([accepted(1), accepted(2, key="k")])

    assert [job.accepted.digest for job in store.unfinished()] == [b"", b"\x00digest\xff"]


def test_large_requests_and_events_are_kept(store: JobStore) -> None:
    text = "ß" * 2_000_000
    store.write([accepted(1, operation={"operation": "infer", "model": "m", "prompt": text})])
    store.write([narrated(1, 1, body=text.encode())])

    (found,) = store.unfinished()

    assert msgspec.json.decode(found.accepted.operation)["prompt"] == text
    assert found.events[0].body == text.encode()


def test_hives_are_given_by_id_as_last_seen(store: JobStore) -> None:
    def seen(hive_id: str, boot: str) -> HiveSeen:
        return HiveSeen(hive_id=hive_id, url=f"http://{hive_id}:7835", boot=boot)

    store.write([seen("b", "1"), seen("a", "1"), seen("B", "1"), seen("b", "2")])
    store.write([seen("a", "3")])

    assert store.hives() == [
        StoredHive(hive_id=hive_id, url=f"http://{hive_id}:7835", boot=boot)
        for hive_id, boot in (("B", "1"), ("a", "3"), ("b", "2"))
    ]


def test_a_hive_that_is_forgotten_is_gone_until_it_is_seen_again(store: JobStore) -> None:
    def seen(hive_id: str) -> HiveSeen:
        return HiveSeen(hive_id=hive_id, url="u", boot="1")

    store.write([seen("a"), seen("b"), seen("c")])
    store.write([HiveForgotten(hive_id="a"), HiveForgotten(hive_id="b"), seen("b")])
    store.write([HiveForgotten(hive_id="never seen")])
    assert [hive.hive_id for hive in store.hives()] == ["b", "c"]

    store.write([seen("a")])
    assert [hive.hive_id for hive in store.hives()] == ["a", "b", "c"]


def test_jobs_that_ended_at_a_time_or_after_it_are_given_by_seq(store: JobStore) -> None:
    ends = {1: 30, 2: 10, 3: 20, 4: 19}
    store.write(
        [record for seq, second in ends.items() for record in (accepted(seq), ended(seq, second=second))]
    )
    store.write([accepted(5)])

    assert [job.accepted.seq for job in store.finished_since(at(20))] == [1, 3]


def test_a_record_is_given_by_id(store: JobStore) -> None:
    store.write([*whole_job(1), accepted(2), started(2), step(2, 1), step(2), ended(2, state="failed")])

    assert store.get(job_id(1)) == JobRecord(
        job_id=job_id(1),
        operation="infer",
        state="completed",
        correlation_id="corr-1",
        created_at=at(1),
        started_at=at(2),
        finished_at=at(3),
        model="rbee-tiny",
        usage=Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7),
        result={"finish_reason": "stop"},
        children=[step(1).lower_job_id],
    )
    failed = store.get(job_id(2))
    assert failed is not None
    assert failed.error == JobError(code="worker_lost", message="It died.", retryable=True)
    assert failed.children == [step(2, 0).lower_job_id, step(2, 1).lower_job_id]
    assert store.get("job-'; DROP TABLE jobs; --") is None


def test_pages_go_from_the_newest_to_the_oldest(store: JobStore) -> None:
    store.write([accepted(seq) for seq in range(1, 8)])

    pages, cursor = [], None
    while True:
        page = store.page(state=None, operation=None, limit=3, before_seq=cursor)
        pages.append([job.correlation_id for job in page.jobs])
        if page.next_cursor is None:
            break
        cursor = int(page.next_cursor)

    assert pages == [["corr-7", "corr-6", "corr-5"], ["corr-4", "corr-3", "corr-2"], ["corr-1"]]


def test_a_page_that_ends_with_the_oldest_has_no_cursor(store: JobStore) -> None:
    store.write([accepted(1), accepted(2)])

    assert store.page(state=None, operation=None, limit=2, before_seq=None).next_cursor is None


def test_pages_are_filtered_by_state_and_operation(store: JobStore) -> None:
    spawn = {"operation": "worker_spawn", "model": "m"}
    store.write([accepted(1), accepted(2, operation=spawn), accepted(3), accepted(4), accepted(5)])
    store.write([started(2), started(3), started(4), ended(3), ended(4, state="failed")])

    def page(state: str | None, operation: str | None) -> list[str]:
        found = store.page(state=state, operation=operation, limit=9, before_seq=None)  # type: ignore[arg-type]
        return [job.correlation_id for job in found.jobs]

    assert page("pending", None) == ["corr-5", "corr-1"]
    assert page("running", None) == ["corr-2"]
    assert page("completed", None) == ["corr-3"]
    assert page("failed", "infer") == ["corr-4"]
    assert page("failed", "worker_spawn") == []
    assert page(None, "worker_spawn") == ["corr-2"]
    assert page("cancelled", None) == []


def test_what_ended_before_a_time_is_forgotten(store: JobStore) -> None:
    store.write(
        [record for seq in (1, 2, 3) for record in (*whole_job(seq)[:-1], ended(seq, second=10 * seq))]
    )
    store.write([accepted(4), narrated(4, 1)])

    forgotten = store.forget(finished_before=at(30), keep=100)

    assert forgotten == 2
    assert seqs(store) == [4, 3]
    assert store.get(job_id(1)) is None
    assert [len(job.events) for job in store.unfinished()] == [1]


def test_all_but_the_ones_that_ended_last_are_forgotten(store: JobStore) -> None:
    ends = {1: 50, 2: 40, 3: 40, 4: 30}
    store.write(
        [record for seq, second in ends.items() for record in (accepted(seq), ended(seq, second=second))]
    )
    store.write([accepted(5)])

    assert store.forget(finished_before=at(0), keep=2) == 2
    assert seqs(store) == [5, 3, 1]
    assert store.forget(finished_before=at(0), keep=2) == 0


def test_one_call_forgets_a_bounded_number(store: JobStore) -> None:
    count = FORGET_AT_ONCE + 3
    store.write([record for seq in range(1, count + 1) for record in (accepted(seq), ended(seq))])

    assert store.forget(finished_before=at(80_000), keep=0) == FORGET_AT_ONCE
    assert seqs(store) == [count, count - 1, count - 2]
    assert store.forget(finished_before=at(80_000), keep=0) == 3
    assert store.forget(finished_before=at(80_000), keep=0) == 0


def test_a_seq_is_never_given_twice_even_when_its_job_is_forgotten(store: JobStore) -> None:
    store.write([record for seq in (1, 2, 3) for record in (accepted(seq), ended(seq))])
    store.forget(finished_before=at(80_000), keep=0)
    assert store.last_seq() == 3

    store.write([accepted(4), ended(4)])
    assert store.last_seq() == 4
    store.forget(finished_before=at(80_000), keep=0)
    assert store.last_seq() == 4


def test_everything_is_there_after_a_restart(store: JobStore) -> None:
    store.write([*whole_job(1), *whole_job(2)[:-1], HiveSeen(hive_id="h", url="u", boot="b")])
    expected = everything(store)

    store.close()
    store.open()

    assert everything(store) == expected


def test_a_closed_store_says_so(store: JobStore) -> None:
    store.close()

    with pytest.raises(StoreFailed, match="not open"):
        store.write([accepted(1)])
    store.close()
