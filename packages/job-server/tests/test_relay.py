"""Two hops: what the lower job says, the upper job says, once each, whatever happens to the wire."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct
from rbee_inprocess import (
    PATIENCE_S,
    Frame,
    LoopClock,
    Running,
    TcpRelay,
    actions,
    eventually,
    frames_of,
    let_pass,
    run_counted,
    running,
    tcp_relay,
    text_of,
)

from rbee_contracts.errors import NotFound, RbeeError, Unavailable, WorkerLost
from rbee_contracts.events import (
    AnyEvent,
    Chunk,
    DownloadProgress,
    Error,
    Execute,
    ExecuteComplete,
    ExecuteError,
    Gap,
    ModelDownloadProgress,
    Narration,
    Token,
    TokenData,
    decode_event,
    encode_event,
)
from rbee_contracts.ids import hop_job_id, step_key
from rbee_contracts.jobs import JobAccepted, JobRecord, JobState
from rbee_contracts.operations import Infer, OpenAI, Operation, Status
from rbee_contracts.sse import START, Position
from rbee_contracts.trace import TraceContext
from rbee_job_client import JobClient, Timeouts
from rbee_job_client.frames import FirehoseParser
from rbee_job_server import JobContext, JobServer, LowerJobFailed, Relay, Submission
from rbee_job_server import relay as relay_module
from rbee_job_server.firehose import Firehose
from rbee_job_server.jobs import CancelReason, Job


class Hops(Struct):
    lower: Running
    upper: Running
    wire: TcpRelay
    relay: Relay

    def lower_jobs(self) -> list[Job]:
        return list(self.lower.server.registry)


async def speak(operation: Infer, context: JobContext) -> dict[str, Any]:
    """What a worker says; a word of the prompt makes it fail, stop or wait."""
    context.narrate("infer_start", "This hop took it, too.")
    words = str(operation.prompt).split()
    if "silent" in words:
        await anyio.sleep_forever()
    for number, word in enumerate(words):
        if number % 10 == 0:
            context.narrate("said", f"word {number}", number=number)
        context.emit_token(f"{word} ")
        await asyncio.sleep(0)
    match words[-1]:
        case "fail":
            raise WorkerLost("The engine died.", code="engine_dead", retryable=True)
        case "crash":
            raise ZeroDivisionError
        case "hang":
            await anyio.sleep_forever()
    return {"words": len(words)}


@pytest.fixture(autouse=True)
def patient_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about how long a relay waits, but for what says so."""
    monkeypatch.setattr(relay_module, "CONNECT_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(relay_module, "CANCEL_TIMEOUT_S", PATIENCE_S)


@asynccontextmanager
async def hops() -> AsyncIterator[Hops]:
    """A worker, a wire that can fail, and a hive that relays."""
    timeouts = Timeouts(connect=PATIENCE_S, request=PATIENCE_S, resume=PATIENCE_S)
    async with (
        running({Infer: speak}) as lower,
        tcp_relay(lower.port) as wire,
        JobClient(wire.url, timeouts=timeouts) as client,
    ):
        relay = Relay(service="worker", peer="w1", client=client)

        async def forward(operation: Infer, context: JobContext) -> Any:
            context.narrate("infer_start", "Taken.")
            return await relay.perform(context, operation, step="infer")

        async with (
            running({Infer: forward}, service="hive", actor="hive/h1") as upper,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(relay.run)
            await eventually(lambda: relay.is_connected, "the worker is followed")
            yield Hops(lower=lower, upper=upper, wire=wire, relay=relay)
            tasks.cancel_scope.cancel()


def infer(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"operation": "infer", "model": "m", "prompt": prompt} | fields


@pytest.mark.anyio
async def test_the_lower_jobs_events_become_the_upper_jobs() -> None:
    async with hops() as both:
        job_id = await both.upper.submit(infer("a b"), X_Correlation_ID="mine")
        frames = await both.upper.read(job_id)
        (lower,) = both.lower_jobs()
        record = (await both.upper.http.get(f"/v1/jobs/{job_id}")).json()

    assert actions(frames) == [
        "execute",
        "infer_start",
        "said",
        "token",
        "token",
        "execute_complete",
        "[DONE]",
    ]
    assert [frame.id for frame in frames] == ["1-0", "2-0", "3-0", "3-1", "3-2", "4-2", ""]
    assert [frame.json["actor"] for frame in frames[:-1]] == [
        *["hive/h1"] * 2,
        *["worker/w1"] * 3,
        "hive/h1",
    ]
    assert {frame.json["job_id"] for frame in frames[:-1]} == {job_id}
    assert {frame.json["correlation_id"] for frame in frames[:-1]} == {"mine"} == {lower.correlation_id}
    assert not any("event_id" in frame.json for frame in frames[:-1])
    assert frames[-2].json["data"] == {"words": 2}
    assert frames[1].json["message"] == "Taken."
    assert lower.id == hop_job_id("worker", step_key(job_id, "infer")) == record["children"][0]


@pytest.mark.anyio
async def test_many_jobs_share_one_firehose_and_never_mix() -> None:
    async with hops() as both:
        names = [f"n{number}" for number in range(20)]
        job_ids = [await both.upper.submit(infer(f"{name} " * 40)) for name in names]
        got: dict[str, list[Frame]] = {}

        async def read(job_id: str) -> None:
            got[job_id] = await both.upper.read(job_id)

        async with anyio.create_task_group() as tasks:
            for job_id in job_ids:
                tasks.start_soon(read, job_id)
        follows = sum(b"GET /v1/events" in request for request in both.wire.requests)
        streams = sum(b"/stream" in request for request in both.wire.requests)

    for job_id, name in zip(job_ids, names, strict=True):
        assert text_of(got[job_id]) == f"{name} " * 40
    assert (follows, streams) == (1, 0)
    assert both.relay.steps == 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("prompt", "code", "message", "retryable"),
    [("a fail", "engine_dead", "The engine died.", True), ("a crash", "internal_error", None, False)],
)
async def test_a_failure_below_is_told_once_with_its_own_code(
    prompt: str, code: str, message: str | None, retryable: bool
) -> None:
    async with hops() as both:
        frames = await both.upper.read(await both.upper.submit(infer(prompt)))

    assert actions(frames)[-3:] == ["error", "execute_error", "[DONE]"]
    assert actions(frames).count("error") == 1
    error = frames[-3].json
    assert (error["code"], error["retryable"], error["actor"]) == (code, retryable, "worker/w1")
    assert frames[-2].json["actor"] == "hive/h1"
    assert message is None or error["message"] == message
    assert frames[-2].json["code"] == code
    assert "ZeroDivision" in error["message"] or message


@pytest.mark.anyio
async def test_a_refusal_below_is_the_upper_jobs_failure() -> None:
    async with hops() as both:
        both.lower.server.stopping = True
        frames = await both.upper.read(await both.upper.submit(infer("a")))

    assert actions(frames) == ["execute", "infer_start", "error", "execute_error", "[DONE]"]
    assert (frames[2].json["code"], frames[2].json["retryable"]) == ("shutting_down", True)


@pytest.mark.anyio
@pytest.mark.parametrize("prompt", ["silent", "a b hang"])
async def test_a_cancel_goes_down(prompt: str) -> None:
    async with hops() as both:
        job_id = await both.upper.submit(infer(prompt), Prefer="respond-async")
        await eventually(
            lambda: both.lower_jobs() and both.lower_jobs()[0].state == "running", "it runs below"
        )
        await both.upper.http.delete(f"/v1/jobs/{job_id}")
        (lower,) = both.lower_jobs()
        await eventually(lambda: lower.state == "cancelled", "it is cancelled below")
        frames = await both.upper.read(job_id)
        await eventually(lambda: both.relay.steps == 0, "the step is over")

    assert actions(frames)[-2:] == ["execute_cancelled", "[DONE]"]
    assert actions(frames).count("execute_cancelled") == 1


@pytest.mark.anyio
async def test_a_reader_that_leaves_cancels_down_to_the_lower_job() -> None:
    """F16."""
    async with hops() as both:
        job_id = await both.upper.submit(infer("a hang", resume_window_s=0))
        async with both.upper.http.stream("GET", f"/v1/jobs/{job_id}/stream") as stream:
            async for _ in stream.aiter_raw():
                if both.lower_jobs() and both.lower_jobs()[0].outputs:
                    break
        (lower,) = both.lower_jobs()
        await eventually(lambda: lower.state == "cancelled", "it is cancelled below")


@pytest.mark.anyio
async def test_the_time_left_goes_down() -> None:
    async with hops() as both:
        begun = time.monotonic()
        job_id = await both.upper.submit(infer("silent", timeout_s=300), X_Deadline_Ms="200000")
        async with both.upper.http.stream("GET", f"/v1/jobs/{job_id}/stream"):
            await eventually(both.lower_jobs, "it runs below")
        (lower,) = both.lower_jobs()
        took_s = time.monotonic() - begun

    assert lower.policy.timeout_s is not None
    assert 199.9 - took_s < lower.policy.timeout_s < 200
    assert any(b"x-deadline-ms: " in request.lower() for request in both.wire.requests)


@pytest.mark.anyio
async def test_a_timeout_ends_both() -> None:
    """F34."""
    async with hops() as both:
        job_id = await both.upper.submit(infer("silent", timeout_s=30), Prefer="respond-async")
        await eventually(
            lambda: both.lower_jobs() and both.lower_jobs()[0].state == "running", "it runs below"
        )
        let_pass(30)
        (lower,) = both.lower_jobs()
        await eventually(lambda: lower.is_finished, "it ended below")
        frames = await both.upper.read(job_id)

    assert actions(frames) == ["execute", "infer_start", "execute_timeout", "[DONE]"]
    assert frames[-2].json["code"] == "timeout"


@pytest.mark.anyio
async def test_a_cancel_below_that_we_did_not_ask_for_is_a_failure() -> None:
    async with hops() as both:
        job_id = await both.upper.submit(infer("a hang"), Prefer="respond-async")
        await eventually(
            lambda: both.lower_jobs() and both.lower_jobs()[0].state == "running", "it runs below"
        )
        both.lower_jobs()[0].cancel(CancelReason.REQUESTED)
        frames = await both.upper.read(job_id)

    assert actions(frames)[-3:] == ["error", "execute_error", "[DONE]"]
    assert frames[-2].json["code"] == "cancelled_below"


@pytest.mark.anyio
@pytest.mark.parametrize("limits", [[1000], [3000, 3000], [400, 500, 600, 20_000]])
async def test_cuts_of_the_wire_lose_and_double_nothing(limits: list[int]) -> None:
    words = [f"w{number}" for number in range(300)]
    async with hops() as both:
        await eventually(lambda: both.wire.accepted, "the follower has connected")
        both.wire.limits = list(limits)
        both.wire.cut()
        async with anyio.create_task_group() as tasks:
            got: list[list[Frame]] = []

            async def run() -> None:
                got.append(await both.upper.read(await both.upper.submit(infer(" ".join(words)))))

            for _ in range(3):
                tasks.start_soon(run)

    for frames in got:
        assert text_of(frames) == "".join(f"{word} " for word in words)
        assert [f.json["data"]["number"] for f in frames if f.action == "said"] == list(range(0, 300, 10))
        assert actions(frames)[-2:] == ["execute_complete", "[DONE]"]


@pytest.mark.anyio
async def test_a_lower_service_that_is_gone_for_good_fails_its_steps() -> None:
    async with hops() as both:
        job_id = await both.upper.submit(infer("a b hang"), Prefer="respond-async")
        upper = both.upper.server.registry.get(job_id)
        await eventually(lambda: upper.outputs == 3, "it has spoken")
        both.wire.refusing = True
        both.wire.cut()
        await both.relay.lose(WorkerLost("Worker w1 was killed."), grace_s=600)
        frames = await both.upper.read(job_id)
        late = await both.upper.read(await both.upper.submit(infer("x")))

    assert text_of(frames) == "a b hang "
    assert actions(frames)[-3:] == ["error", "execute_error", "[DONE]"]
    assert frames[-3].json["code"] == late[-3].json["code"] == "worker_lost"
    assert both.relay.steps == 0


@pytest.mark.anyio
async def test_what_a_dying_service_still_said_is_taken_first() -> None:
    async with hops() as both:
        job_id = await both.upper.submit(infer(" ".join(["w"] * 500) + " hang"), Prefer="respond-async")
        await eventually(lambda: both.lower_jobs() and both.lower_jobs()[0].outputs == 501, "it has spoken")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(both.relay.lose, WorkerLost("Worker w1 was killed."), 600)
            await asyncio.sleep(0)
            both.lower.server.firehose.close()
        frames = await both.upper.read(job_id)

    assert text_of(frames) == "w " * 500 + "hang "


@pytest.mark.anyio
async def test_a_lower_service_that_cannot_be_reached_fails_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "CONNECT_TIMEOUT_S", 0.05)
    async with hops() as both:
        await eventually(lambda: both.wire.accepted, "the follower has connected")
        both.wire.refusing = True
        both.wire.cut()
        await eventually(lambda: not both.relay._connected.is_set(), "the loss was noticed")
        frames = await both.upper.read(await both.upper.submit(infer("a")))

        assert frames[-3].json["code"] == "unreachable"
        assert frames[-3].json["retryable"] is True
        both.wire.refusing = False
        await eventually(both.relay._connected.is_set, "it is followed again")
        assert actions(await both.upper.read(await both.upper.submit(infer("a"))))[-2] == "execute_complete"


# --- with a lower service that is made up --------------------------------------------------------------

COMMON: dict[str, Any] = {
    "actor": "worker/w1",
    "correlation_id": "corr-1",
    "timestamp": "2026-01-01T00:00:00.000000Z",
}
GAP = Gap(message="", actor="worker/w1", job_id="", correlation_id="", timestamp="")


class MadeUpService:
    """A lower service whose one job says what it is told, over a firehose that does what it is told."""

    def __init__(self) -> None:
        self.send: MemoryObjectSendStream[list[AnyEvent]]
        self._receive: MemoryObjectReceiveStream[list[AnyEvent]]
        self.send, self._receive = anyio.create_memory_object_stream[list[AnyEvent]](1000)
        self.job_id = ""
        self.log: list[tuple[Position, AnyEvent]] = []
        self.submitted = anyio.Event()
        self.answer_submit = anyio.Event()
        self.answer_submit.set()
        self.accepted = False
        self.cancelled: list[str] = []
        self.read_from: list[Position] = []
        self.state: JobState = "running"

    def say(self, event: Callable[..., AnyEvent], **fields: Any) -> AnyEvent:
        n, i = self.log[-1][0] if self.log else START
        made = event(job_id=self.job_id, **(COMMON | fields))
        position = Position(n, i + 1) if made.kind == "output" else Position(n + 1, i)
        self.log.append((position, made))
        return decode_event(
            encode_event(made)[:-1] + b',"event_id":"%d-%d"}' % (position.narrations, position.outputs)
        )

    async def submit(
        self,
        operation: Operation,
        *,
        correlation_id: str | None = None,
        respond_async: bool = False,
        idempotency_key: str | None = None,
        time_left_s: float | None = None,
        trace: TraceContext | None = None,
    ) -> JobAccepted:
        assert respond_async
        assert idempotency_key
        self.job_id = hop_job_id("worker", idempotency_key)
        self.submitted.set()
        await self.answer_submit.wait()
        self.accepted = True
        return JobAccepted(job_id=self.job_id, sse_url="")

    async def cancel(self, job_id: str, *, correlation_id: str | None = None) -> bool:
        self.cancelled.append(job_id)
        return True

    async def follow_raw(
        self, *, on_connection: Callable[[bool], None] | None = None
    ) -> AsyncIterator[list[AnyEvent | bytes]]:
        assert on_connection
        on_connection(True)
        async with self._receive:
            async for batch in self._receive:
                yield list(batch)

    async def get(self, job_id: str) -> JobRecord:
        if not self.accepted:
            raise NotFound(f"No job {job_id}.", code="job_not_found")
        return JobRecord(
            job_id=job_id,
            operation="status",
            state=self.state,
            correlation_id="corr-1",
            created_at="",
            position=str(self.log[-1][0]) if self.log else None,
        )

    async def stream_from(
        self, job_id: str, position: Position
    ) -> AsyncGenerator[tuple[Position, AnyEvent], None]:
        self.read_from.append(position)
        if not self.accepted:
            raise NotFound(f"No job {job_id}.", code="job_not_found")
        for place in range(10_000):
            await eventually(lambda place=place: place < len(self.log), "the lower job says more")  # type: ignore[misc]
            at, event = self.log[place]
            if event.kind == "output":
                if at.outputs > position.outputs:
                    yield at, event
            elif at.narrations > position.narrations:
                yield at, event


class RawMadeUpService(MadeUpService):
    """The same, whose output comes as its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = 0

    async def follow_raw(
        self, *, on_connection: Callable[[bool], None] | None = None
    ) -> AsyncIterator[list[AnyEvent | bytes]]:
        parser, seq = FirehoseParser(), 0
        async for batch in super().follow_raw(on_connection=on_connection):
            chunk = b""
            for event in batch:
                assert not isinstance(event, bytes)
                seq += 1
                chunk += b"id: ab12-%d\ndata: %b\n\n" % (seq, on_firehose(event))
            given = parser.feed_raw(chunk)
            self.raw += sum(isinstance(event, bytes) for event in given)
            yield given


def on_firehose(event: AnyEvent) -> bytes:
    """The event's JSON as the firehose has it: with its place first."""
    place = b'"event_id":"%b",' % event.event_id.encode() if event.event_id else b""
    return b"{" + place + encode_event(msgspec.structs.replace(event, event_id=None))[1:]


@asynccontextmanager
async def relaying(below: MadeUpService) -> AsyncIterator[tuple[Job, Relay]]:
    """An upper job under way to a made up service, in counted time."""
    relay = Relay(service="worker", peer="w1", client=below)

    async def forward(operation: Operation, context: JobContext) -> Any:
        return await relay.perform(context, operation, step="infer")

    server = JobServer(service="hive", actor="hive/h1", handlers={Status: forward}, clock=LoopClock())
    async with anyio.create_task_group() as tasks, below.send:
        await tasks.start(server.run)
        tasks.start_soon(relay.run)
        job = server.submit(Submission(operation=Status(), correlation_id="corr-1", respond_async=True))
        await below.submitted.wait()
        yield job, relay
        tasks.cancel_scope.cancel()


def read(job: Job) -> list[Frame]:
    return frames_of(job.reader(START).take())


async def ended(job: Job) -> None:
    await eventually(lambda: job.is_finished, "the job ended")


said = st.lists(st.sampled_from(["narrate", "token"]), max_size=14)
fates = st.lists(
    st.sampled_from(["once", "once", "twice", "lost", "gap before", "again all"]), min_size=15, max_size=15
)


@settings(max_examples=150, deadline=None)
@given(said=said, fates=fates, batch=st.integers(1, 4), ends_well=st.booleans(), raw=st.booleans())
def test_any_loss_and_doubling_on_the_firehose_is_mended(
    said: list[str], fates: list[str], batch: int, ends_well: bool, raw: bool
) -> None:
    async def walk() -> None:
        below = RawMadeUpService() if raw else MadeUpService()
        async with relaying(below) as (job, relay):
            sent: list[AnyEvent] = [below.say(Execute, message="go", formatted="")]
            for number, kind in enumerate(said):
                if kind == "token":
                    index = below.log[-1][0].outputs
                    sent.append(below.say(Token, message=f"{number} ", index=index))
                else:
                    sent.append(below.say(Narration, action="said", message=f"{number} "))
            if ends_well:
                sent.append(below.say(ExecuteComplete, message="end", formatted="", data="result"))
            else:
                sent.append(below.say(Error, message="bad", formatted="", code="bad", retryable=False))
                sent.append(below.say(ExecuteError, message="end", formatted="", code="bad"))
            wire: list[AnyEvent] = []
            for event, fate in zip(sent, [*fates, "once", "once"], strict=False):
                wire += {
                    "once": [event],
                    "twice": [event, event],
                    "lost": [],
                    "gap before": [GAP, event],
                    "again all": [*wire, event],
                }[fate]
            wire.append(GAP)
            for start in range(0, len(wire), batch):
                await below.send.send(wire[start : start + batch])
                await asyncio.sleep(0)
            await ended(job)
            frames = read(job)
            assert relay.steps == 0
            assert below.cancelled == []

        relayed = [
            (frame.action, frame.json["message"]) for frame in frames if frame.action in ("said", "token")
        ]
        assert relayed == [("token" if kind == "token" else "said", f"{n} ") for n, kind in enumerate(said)]
        assert actions(frames)[0] == "execute"
        assert actions(frames).count("execute") == 1
        if ends_well:
            assert frames[-2].json["data"] == "result"
        else:
            assert actions(frames)[-3:] == ["error", "execute_error", "[DONE]"]
            assert frames[-3].json["code"] == "bad"

    run_counted(walk)


HARD_TEXTS = [
    '","job_id":"job-00000000-0000-4000-8000-000000000000","correlation_id":"',
    '\\","job_id":"',
    '{"job_id":"',
    '"',
    "\\",
    '\\\\"',
    "\x00\x1f\x7f",
    "\r\n\n",
    "\u2028\U0001f980é",
    '","index":7}',
    "",
]
hard_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(HARD_TEXTS)
outputs = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *["token"] * 4,
                *["chunk"] * 2,
                "chunk without data",
                "token with data",
                "repeated token",
                "token of another index",
                "narration",
            ]
        ),
        hard_texts,
    ),
    max_size=12,
)


def say_output(below: MadeUpService, kind: str, text: str) -> AnyEvent:
    index = below.log[-1][0].outputs
    data = msgspec.Raw(b'{"x":[1.50,{"job_id":"job-1"}],"y":' + msgspec.json.encode(text) + b"}")
    match kind:
        case "token":
            return below.say(Token, message=text, index=index)
        case "token with data":
            return below.say(Token, message=text, index=index, data=TokenData(choice=1))
        case "repeated token":
            return below.say(Token, message=text, index=index, repeated=True)
        case "token of another index":
            return below.say(Token, message=text, index=index + 3)
        case "chunk":
            return below.say(Chunk, message=text, index=index, data=data)
        case "chunk without data":
            return below.say(Chunk, message=text, index=index)
    return below.say(Narration, action="said", message=text)


@settings(max_examples=150, deadline=None)
@given(outputs=outputs, batch=st.integers(1, 5))
def test_output_that_is_passed_on_is_what_decoding_it_would_have_given(
    outputs: list[tuple[str, str]], batch: int
) -> None:
    async def walk(below: MadeUpService) -> tuple[bytes, bytes]:
        async with relaying(below) as (job, _):
            firehose = job._publisher
            assert isinstance(firehose, Firehose)
            follower = firehose.follow(None, output=True)
            sent = [below.say(Execute, message="go", formatted="")]
            sent += [say_output(below, kind, text) for kind, text in outputs]
            sent.append(below.say(ExecuteComplete, message="end", formatted=""))
            for start in range(0, len(sent), batch):
                await below.send.send(sent[start : start + batch])
                await asyncio.sleep(0)
            await ended(job)
            # Without what begins it, and without its ids, which are this service's.
            told = b"\n".join(frame.partition(b"\n")[2] for frame in follower.take().split(b"\n\n")[1:])
            own = job.reader(START).take()
            return own.replace(job.id.encode(), b"JOB"), told.replace(job.id.encode(), b"JOB")

    results = []
    raw = RawMadeUpService()
    for below in (raw, MadeUpService()):

        async def run(below: MadeUpService = below) -> None:
            results.append(await walk(below))

        run_counted(run)

    assert results[0] == results[1]
    assert raw.raw == sum(kind != "narration" for kind, _ in outputs)


def test_plain_output_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def decode(body: bytes) -> AnyEvent:
        decoded.append(body)
        return decode_event(body)

    monkeypatch.setattr(relay_module, "decode_event", decode)

    async def walk() -> None:
        below = RawMadeUpService()
        async with relaying(below) as (job, _):
            await below.send.send([below.say(Execute, message="go", formatted="")])
            for index, text in enumerate(HARD_TEXTS):
                await below.send.send([below.say(Token, message=text, index=index)])
            await below.send.send([say_output(below, "chunk", "x")])
            await below.send.send([say_output(below, "token with data", "the last")])
            await below.send.send([below.say(ExecuteComplete, message="end", formatted="")])
            await ended(job)

            assert text_of(read(job)) == "".join(HARD_TEXTS) + "the last"

    run_counted(walk)
    assert len(decoded) == 1
    assert b"the last" in decoded[0]


@pytest.mark.parametrize(
    "body",
    [
        b'{"event_id":"1-1","action":"token","message":"x","actor":"w","job_id":"JOB"',
        b'{"event_id":"1-1","action":"token","message":"x","job_id":"JOB","actor":"w"}',
        b'{"event_id":"1-1","action":"token","message":"x","actor":"w","job_id":"JOB","correlation_id":"c",'
        b'"timestamp":"t","index":00}',
        b'{"event_id":"1-1","action":"token","message":"\xff","actor":"w","job_id":"JOB","correlation_id":"c",'
        b'"timestamp":"t","index":0}',
        b'{"event_id":"1-1","action":"token","message":"\\ud800","actor":"w","job_id":"JOB",'
        b'"correlation_id":"c","timestamp":"t","index":0}',
        b"nonsense",
    ],
)
def test_bytes_that_are_no_plain_output_are_never_passed_on(body: bytes) -> None:
    async def walk() -> None:
        below = MadeUpService()
        async with relaying(below) as (job, relay):
            await below.send.send([below.say(Execute, message="go", formatted="")])
            await asyncio.sleep(0)
            relay._pass_on(body.replace(b"JOB", below.job_id.encode()))
            await below.send.send([below.say(Token, message="after", index=0)])
            await below.send.send([below.say(ExecuteComplete, message="end", formatted="")])
            await ended(job)

            assert text_of(read(job)) == "after"

    run_counted(walk)


def test_output_of_a_job_that_has_too_much_is_refused_on_the_short_way_too() -> None:
    async def walk() -> None:
        below = RawMadeUpService()
        async with relaying(below) as (job, _):
            await below.send.send([below.say(Execute, message="go", formatted="")])
            for index in range(18):
                await below.send.send([below.say(Token, message="x" * 2**20, index=index)])
            await ended(job)

            assert job.error is not None
            assert job.error.code == "output_too_large"
            assert job.outputs == 15

    run_counted(walk)


def test_progress_that_was_replaced_below_is_not_taken_for_a_loss() -> None:
    async def walk() -> None:
        below = MadeUpService()

        def progress(done: int) -> AnyEvent:
            data = DownloadProgress(model="m", bytes_done=done, bytes_total=None, rate=1.0, eta_s=None)
            return below.say(ModelDownloadProgress, message=f"{done}", formatted="", data=data)

        async with relaying(below) as (job, relay):
            await below.send.send([below.say(Execute, message="go", formatted=""), progress(1)])
            for done in (2, 3, 4):
                progress(done)  # lost on the firehose
            del below.log[1:4]  # replaced below
            await below.send.send([GAP])
            await eventually(lambda: below.read_from, "the lower job's own stream is read")
            await below.send.send([progress(5), below.say(Narration, action="said", message="a")])
            await below.send.send([below.say(ExecuteComplete, message="end", formatted="", data="result")])
            await ended(job)
            frames = read(job)
            assert relay.steps == 0

        # The upper log has replaced what came before 5 in its turn; their numbers stay theirs.
        assert [(frame.id, frame.action) for frame in frames] == [
            ("1-0", "execute"),
            ("4-0", "model_download_progress"),
            ("5-0", "said"),
            ("6-0", "execute_complete"),
            ("", "[DONE]"),
        ]
        assert below.read_from == [Position(2, 0)]

    run_counted(walk)


def test_a_gap_before_the_submit_is_answered_fails_nothing() -> None:
    async def walk() -> None:
        below = MadeUpService()
        below.answer_submit = anyio.Event()
        async with relaying(below) as (job, relay):
            await below.send.send([GAP])
            await anyio.sleep(1)
            assert not job.is_finished
            assert (relay.handed.pieces, relay.handed.gaps, relay.handed.rereads) == (1, 1, 0)
            below.say(Execute, message="go", formatted="")
            below.say(Token, message="all", index=0)
            below.say(ExecuteComplete, message="end", formatted="", data=1)
            below.answer_submit.set()
            await ended(job)

            assert actions(read(job)) == ["execute", "token", "execute_complete", "[DONE]"]
            assert (relay.handed.rereads, relay.is_connected) == (1, True)

    run_counted(walk)


@pytest.mark.parametrize(
    "strange",
    [
        lambda job_id: Narration(action="from_the_future", message="", job_id=job_id, **COMMON),
        lambda job_id: Narration(action="said", message="", job_id=job_id, event_id="", **COMMON),
        lambda job_id: Narration(action="said", message="", job_id=job_id, event_id="x-y", **COMMON),
        lambda job_id: Token(message="x", index=0, job_id=job_id, **COMMON),
        lambda _: Token(message="x", index=0, job_id="job-of-another", event_id="bad", **COMMON),
        lambda _: GAP,
    ],
)
def test_strange_frames_do_not_end_the_relay(strange: Callable[[str], AnyEvent]) -> None:
    async def walk() -> None:
        below = MadeUpService()
        async with relaying(below) as (job, _):
            await below.send.send([below.say(Execute, message="go", formatted="")])
            await below.send.send([strange(below.job_id)])
            await below.send.send([below.say(Token, message="after", index=0)])
            await below.send.send([below.say(ExecuteComplete, message="end", formatted="")])
            await ended(job)

            assert actions(read(job)) == ["execute", "token", "execute_complete", "[DONE]"]

    run_counted(walk)


def test_an_event_that_cannot_be_said_again_fails_its_job_and_not_the_relay() -> None:
    async def walk() -> None:
        below = MadeUpService()
        async with relaying(below) as (job, relay):
            bad = Narration(action="said", message="\ud800", job_id=below.job_id, event_id="1-0", **COMMON)
            await below.send.send([bad])
            await ended(job)
            await anyio.sleep(1)

            assert actions(read(job))[-3:] == ["error", "execute_error", "[DONE]"]
            assert below.cancelled == [below.job_id]
            assert relay.steps == 0
            await below.send.send([GAP])

    run_counted(walk)


def test_a_lower_job_that_is_no_longer_known_is_lost() -> None:
    async def walk() -> None:
        below = MadeUpService()
        async with relaying(below) as (job, _):
            await below.send.send([below.say(Token, message="x", index=0)])
            await anyio.sleep(1)
            below.accepted = False
            await below.send.send([GAP])
            await ended(job)
            frames = read(job)

            assert actions(frames) == ["execute", "token", "error", "execute_error", "[DONE]"]
            assert frames[-2].json["code"] == "job_lost"

    run_counted(walk)


def test_a_lower_job_that_is_forgotten_before_it_spoke_is_sent_again_under_the_same_key() -> None:
    """What the first run narrated is not told twice, though the second says less of it."""

    async def walk() -> None:
        below = MadeUpService()
        async with relaying(below) as (job, relay):
            await below.send.send([below.say(Execute, message="go", formatted="")])
            for number in range(4):
                said = below.say(Narration, action="loading", message=f"{number}")
                await below.send.send([said])
            await eventually(lambda: "loading" in actions(read(job)), "it is passed on")
            key, below.submitted = below.job_id, anyio.Event()
            below.log.clear()
            below.accepted = False
            await below.send.send([GAP])
            await below.submitted.wait()
            assert below.job_id == key
            await below.send.send([below.say(Execute, message="go", formatted="")])
            await below.send.send([below.say(Narration, action="loading", message="0")])
            await below.send.send([below.say(ExecuteComplete, message="end", formatted="", data="result")])
            await ended(job)
            frames = read(job)
            assert relay.steps == 0

        assert actions(frames) == ["execute", *["loading"] * 4, "warning", "execute_complete", "[DONE]"]
        assert "had forgotten this job before it said anything" in frames[5].json["message"]
        assert frames[-2].json["data"] == "result"
        assert below.cancelled == []

    run_counted(walk)


def test_a_lower_job_that_is_sent_again_and_ends_at_once_is_read_to_its_end() -> None:
    async def walk() -> None:
        below = MadeUpService()
        async with relaying(below) as (job, _):
            await below.send.send([below.say(Execute, message="go", formatted="")])
            await below.send.send([below.say(Narration, action="loading", message="1")])
            await eventually(lambda: "loading" in actions(read(job)), "it is passed on")
            below.log.clear()
            below.accepted = False
            below.answer_submit = anyio.Event()
            await below.send.send([GAP])
            below.say(Token, message="all", index=0)
            below.say(ExecuteComplete, message="end", formatted="", data=7)
            below.state = "completed"
            below.answer_submit.set()
            await ended(job)
            frames = read(job)

        assert actions(frames) == ["execute", "loading", "warning", "token", "execute_complete", "[DONE]"]
        assert below.read_from[-1] == START

    run_counted(walk)


def test_a_lower_job_that_is_forgotten_twice_or_cannot_be_sent_again_fails_and_never_hangs() -> None:
    async def walk() -> None:
        below = MadeUpService()

        async def refuse(*_: Any, **__: Any) -> JobAccepted:
            raise Unavailable("The hive is draining.", code="draining")

        async with relaying(below) as (job, _):
            await below.send.send([below.say(Execute, message="go", formatted="")])
            await anyio.sleep(1)
            below.accepted = False
            below.submit = refuse  # type: ignore[method-assign]
            await below.send.send([GAP])
            await ended(job)

            assert actions(read(job)) == ["execute", "warning", "error", "execute_error", "[DONE]"]
            assert read(job)[-2].json["code"] == "draining"

    run_counted(walk)


def test_failing_the_steps_fails_what_is_under_way_only() -> None:
    async def walk() -> None:
        below = MadeUpService()
        async with relaying(below) as (job, relay):
            relay.fail_steps(Unavailable("The hive does not answer.", code="hive_unreachable"))
            await ended(job)

            assert read(job)[-2].json["code"] == "hive_unreachable"
            assert not isinstance(relay._lost, RbeeError)

    run_counted(walk)


def test_an_upper_job_that_ends_while_it_submits_cancels_below() -> None:
    async def walk() -> None:
        below = MadeUpService()
        below.answer_submit = anyio.Event()
        async with relaying(below) as (job, _):
            job.cancel(CancelReason.REQUESTED)
            await anyio.sleep(1)

            assert below.cancelled == [below.job_id]

    run_counted(walk)


def test_a_failure_below_is_an_error_of_ours() -> None:
    assert issubclass(LowerJobFailed, RbeeError)
    assert OpenAI.__struct_config__.tag == "openai"
