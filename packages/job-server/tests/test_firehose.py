"""The firehose: all events to whoever follows, a gap where some are lost, nothing for nobody."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rbee_inprocess import PATIENCE_S, Frame, ManualClock, frames_of
from starlette.types import Message

from rbee_contracts.errors import RbeeError
from rbee_contracts.ids import new_job_id
from rbee_contracts.operations import Infer
from rbee_contracts.sse import parse_event_id, parse_firehose_id
from rbee_job_server import firehose as firehose_module
from rbee_job_server.firehose import LINGER_S, RING_BYTES, Firehose, Follower
from rbee_job_server.jobs import Job, JobPolicy
from rbee_job_server.streams import EventStreamResponse

BOOT = "0123456789abcdef"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def make_firehose(clock: ManualClock | None = None) -> Firehose:
    return Firehose(BOOT, "worker/w1", clock or ManualClock())


def start_job(firehose: Firehose) -> Job:
    job = Job(
        job_id=new_job_id(),
        seq=1,
        operation=Infer(model="m", prompt="SECRET-PROMPT"),
        correlation_id="corr-1",
        idempotency_key=None,
        policy=JobPolicy(starts_at_once=True, resume_window_s=None, timeout_s=None),
        unknown_fields={},
        actor="worker/w1",
        clock=ManualClock(),
        publisher=firehose,
    )
    job.start()
    return job


def taken(follower: Follower) -> list[Frame]:
    return frames_of(follower.take())


def in_job(frames: list[Frame]) -> list[tuple[str, str]]:
    """Each event's place in its job's stream, and its action."""
    return [(str(frame.json.get("event_id")), frame.action) for frame in frames]


def test_frames_carry_both_ids_and_the_same_event_as_the_jobs_stream() -> None:
    firehose = make_firehose()
    follower = firehose.follow(None, output=True)
    job = start_job(firehose)
    job.narrate("said", 'with "quotes" and {braces}', {"a": 1})
    job.emit_token("x")
    job.complete({"n": 1})
    frames = taken(follower)
    own = frames_of(job.reader(parse_event_id("0-0")).take())[:-1]

    assert [frame.id for frame in frames] == [f"{BOOT}-{seq}" for seq in (1, 2, 3, 4)]
    assert [frame.json for frame in frames] == [{"event_id": f.id} | f.json for f in own]
    assert [frame.event.event_id for frame in frames] == [f.id for f in own]


def test_a_follower_starts_at_now() -> None:
    firehose = make_firehose()
    early = firehose.follow(None, output=True)
    job = start_job(firehose)
    late = firehose.follow(None, output=True)
    job.emit_token("x")

    assert in_job(taken(late)) == [("1-1", "token")]
    assert in_job(taken(early)) == [("1-0", "execute"), ("1-1", "token")]


def test_the_head_names_a_place_to_resume_from_before_any_event() -> None:
    firehose = make_firehose()
    start_job(firehose)
    follower = firehose.follow(None, output=True)

    head = follower.take()

    assert head == f"retry: 500\nid: {BOOT}-1\n\n".encode()
    assert follower.take() == b""


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["say", "token", "take", "drop"]), max_size=40),
    output=st.booleans(),
    ring=st.sampled_from([400, 2000, RING_BYTES]),
)
def test_resumption_gives_exactly_the_rest_or_one_gap(steps: list[str], output: bool, ring: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firehose_module, "RING_BYTES", ring)
        firehose = make_firehose()
        other = firehose.follow(None, output=True)
        follower = firehose.follow(None, output=output)
        jobs = [start_job(firehose), start_job(firehose)]
        last_id = f"{BOOT}-0"
        expected = [("1-0", "execute")] * 2
        for number, step in enumerate(steps):
            match step:
                case "say":
                    jobs[number % 2].narrate("said", "something")
                    expected.append((str(jobs[number % 2].record().position), "said"))
                case "token":
                    jobs[number % 2].emit_token("x")
                    if output:
                        expected.append((str(jobs[number % 2].record().position), "token"))
                case "drop":
                    follower.close()
                    follower = firehose.follow(parse_firehose_id(last_id), output=output)
                case _:
                    frames = taken(follower)
                    gaps = [frame for frame in frames if frame.action == "gap"]
                    got = in_job([frame for frame in frames if frame.action != "gap"])
                    assert len(gaps) <= 1
                    assert not gaps or frames[0] is gaps[0]
                    assert got == expected[len(expected) - len(got) :]
                    assert bool(gaps) >= (len(got) < len(expected))
                    if ring == RING_BYTES:
                        assert not gaps
                    expected = []
                    last_id = frames[-1].id if frames else last_id
        other.close()


@pytest.mark.parametrize("after", [("fedcba", 1), (BOOT, 99)], ids=["other boot", "ahead"])
def test_an_id_of_another_life_gives_one_gap_and_then_what_comes(after: tuple[str, int]) -> None:
    firehose = make_firehose()
    first = firehose.follow(None, output=True)
    job = start_job(firehose)
    follower = firehose.follow(after, output=True)
    job.emit_token("x")
    job.emit_token("y")
    first.close()

    assert [frame.action for frame in taken(follower)] == ["gap", "token", "token"]


def test_an_id_older_than_the_ring_gives_one_gap_and_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firehose_module, "RING_BYTES", 1000)
    firehose = make_firehose()
    reader = firehose.follow(None, output=True)
    job = start_job(firehose)
    for number in range(50):
        job.emit_token(str(number))
    frames = taken(firehose.follow((BOOT, 1), output=True))

    assert [frame.action for frame in frames[:2]] == ["gap", "token"]
    assert {frame.action for frame in frames[1:]} == {"token"}
    assert frames[-1].json["message"] == "49"
    assert taken(reader)[0].action == "gap"


def test_a_connection_that_breaks_right_after_a_gap_loses_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firehose_module, "RING_BYTES", 1000)
    firehose = make_firehose()
    firehose.follow(None, output=True)
    job = start_job(firehose)
    for number in range(50):
        job.emit_token(str(number))
    frames = taken(firehose.follow((BOOT, 1), output=True))
    resumed = taken(firehose.follow(parse_firehose_id(frames[0].id), output=True))

    assert resumed == frames[1:]


def test_the_ring_is_bounded_in_bytes() -> None:
    firehose = make_firehose()
    firehose.follow(None, output=True)
    job = start_job(firehose)
    text = "x" * 100_000
    for _ in range(200):
        job.emit_token(text)

    kept = sum(len(frame.full) for frame in firehose._ring)
    assert RING_BYTES - 200_000 < kept <= RING_BYTES


def test_an_event_larger_than_the_ring_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firehose_module, "RING_BYTES", 1000)
    firehose = make_firehose()
    follower = firehose.follow(None, output=True)
    job = start_job(firehose)
    follower.take()
    job.emit_token("x" * 5000)

    assert [frame.action for frame in taken(follower)] == ["gap"]
    job.emit_token("y")
    assert [frame.action for frame in taken(follower)] == ["token"]


def test_a_public_follower_sees_no_output_and_no_result() -> None:
    firehose = make_firehose()
    public = firehose.follow(None, output=False)
    full = firehose.follow(None, output=True)
    job = start_job(firehose)
    job.narrate("said", "before")
    for _ in range(3):
        job.emit_token("SECRET-OUTPUT")
    job.complete({"text": "SECRET-RESULT"})
    body = public.take()

    assert in_job(frames_of(body)) == [("1-0", "execute"), ("2-0", "said"), ("3-3", "execute_complete")]
    assert b"SECRET" not in body
    assert "data" not in frames_of(body)[-1].json
    assert full.take().count(b"SECRET-OUTPUT") == 3
    assert frames_of(body)[-1].id == f"{BOOT}-6"


def test_two_followers_get_the_same() -> None:
    firehose = make_firehose()
    followers = [firehose.follow(None, output=True) for _ in range(2)]
    job = start_job(firehose)
    job.emit_token("x")
    first = taken(followers[0])
    job.fail(RbeeError("It broke."))

    assert first + taken(followers[0]) == taken(followers[1])


def test_nothing_is_kept_when_nobody_follows(clock: ManualClock) -> None:
    firehose = make_firehose(clock)
    job = start_job(firehose)
    job.emit_token("x")
    follower = firehose.follow(None, output=True)
    job.emit_token("y")

    assert len(firehose._ring) == 1
    assert in_job(taken(follower)) == [("1-2", "token")]


def test_frames_are_kept_a_while_after_the_last_follower_left(clock: ManualClock) -> None:
    firehose = make_firehose(clock)
    job = start_job(firehose)
    follower = firehose.follow(None, output=True)
    job.emit_token("a")
    last_id = taken(follower)[-1].id
    follower.close()
    clock.now += LINGER_S - 1
    job.emit_token("b")
    resumed = firehose.follow(parse_firehose_id(last_id), output=True)

    assert [frame.json["message"] for frame in taken(resumed)] == ["b"]

    resumed.close()
    clock.now += LINGER_S + 1
    job.emit_token("c")
    assert not firehose._ring
    assert [frame.action for frame in taken(firehose.follow(parse_firehose_id(last_id), output=True))] == [
        "gap"
    ]


def test_a_silence_longer_than_the_linger_is_no_gap(clock: ManualClock) -> None:
    firehose = make_firehose(clock)
    job = start_job(firehose)
    follower = firehose.follow(None, output=True)
    job.emit_token("a")
    last_id = taken(follower)[-1].id
    follower.close()
    clock.now += LINGER_S * 10

    assert taken(firehose.follow(parse_firehose_id(last_id), output=True)) == []


# --- how it leaves -------------------------------------------------------------------------------------


class Sent:
    """An ASGI `send` that keeps the bodies, and a `receive` whose client stays until told."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.gone = asyncio.Event()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.bodies.append(bytes(message["body"]))

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def turns(condition: Callable[[], Any]) -> None:
    """Let the loop turn until `condition` holds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("never")


@pytest.mark.anyio
async def test_all_that_is_said_in_one_turn_of_the_loop_leaves_in_one_write() -> None:
    firehose = make_firehose()
    follower = firehose.follow(None, output=True)
    jobs = [start_job(firehose) for _ in range(8)]
    sent = Sent()
    response = EventStreamResponse(follower, on_close=follower.close, pings=False)
    task = asyncio.ensure_future(response({"type": "http"}, sent.receive, sent.send))
    await turns(lambda: sent.bodies)
    for _ in range(5):
        await asyncio.sleep(0)
    before = len(sent.bodies)

    for step in range(3):
        for job in jobs:
            job.emit_token(f"step {step}")
        await turns(lambda step=step: len(sent.bodies) > before + step)  # type: ignore[misc]
        for _ in range(5):
            await asyncio.sleep(0)

    assert [len(frames_of(body)) for body in sent.bodies[before:]] == [8, 8, 8]
    sent.gone.set()
    await task
    assert firehose.followers == 0


@pytest.mark.anyio
async def test_closing_gives_what_is_pending_and_ends_the_stream() -> None:
    firehose = make_firehose()
    follower = firehose.follow(None, output=True)
    sent = Sent()
    task = asyncio.ensure_future(
        EventStreamResponse(follower, on_close=follower.close)({"type": "http"}, sent.receive, sent.send)
    )
    await turns(lambda: sent.bodies)
    start_job(firehose)
    firehose.close()
    await asyncio.wait_for(task, PATIENCE_S)

    assert [frame.action for frame in frames_of(b"".join(sent.bodies))] == ["execute"]
