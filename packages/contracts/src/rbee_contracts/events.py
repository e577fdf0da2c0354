"""Every event of a job's stream, one struct each; the tag is `action`.

Three kinds: narration (tells what happens), output (`token`, `chunk`: what was asked for) and terminal
(exactly one ends every job). An action this version does not know decodes as `Narration`, so a newer
peer never breaks an older one.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta, Struct

from rbee_contracts.ids import HiveId, JobId, ModelId, WorkerId

Kind: TypeAlias = Literal["narration", "output", "terminal"]
Index = Annotated[int, Meta(ge=0)]


# --- what `data` holds ---------------------------------------------------------------------------------


class Usage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timings(Struct, frozen=True, kw_only=True):
    """Milliseconds in the engine's queue, in prefill and in decode; TTFT; tokens per second of decode."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    tokens_per_second: float


class ChoiceEnd(Struct, frozen=True, kw_only=True):
    """How one of `n` choices ended."""

    choice: int
    finish_reason: str
    stop_reason: int | str | None = None


class InferResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Result of `infer`. `choices` only where `n` is more than 1."""

    usage: Usage
    finish_reason: str
    timings: Timings
    stop_reason: int | str | None = None
    choices: list[ChoiceEnd] = []


class OpenAIHead(Struct, frozen=True, kw_only=True):
    """How the engine's answer begins. `stream`: its chunks are the frames of an event stream."""

    status: int
    content_type: str
    stream: bool = False


class OpenAIResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Result of `openai`; the body came as `chunk` events.

    One chunk for each frame of an event stream, and else one for the whole body: JSON as it stands, any
    other text as a JSON string. `done`: the stream ended with `[DONE]`.
    """

    status: int
    content_type: str
    done: bool = False
    usage: Usage | None = None


class TokenLogprob(Struct, frozen=True, kw_only=True):
    token_id: int
    token: str
    logprob: float


class TokenData(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Only where asked for: `choice` with `n` > 1; `logprobs`, one list of candidates per token."""

    choice: int = 0
    logprobs: list[list[TokenLogprob]] = []


class Candidate(Struct, frozen=True, kw_only=True):
    """One worker the scheduler looked at: its score (lower is better), or why it was rejected."""

    hive_id: HiveId
    worker_id: WorkerId
    model: ModelId
    score: float | None
    reason: str


class Decision(Struct, frozen=True, kw_only=True):
    """Where a request runs and why; every candidate is named."""

    model: ModelId
    hive_id: HiveId
    worker_id: WorkerId
    reason: str
    candidates: list[Candidate]


class Placement(Struct, frozen=True, kw_only=True):
    hive_id: HiveId
    worker_id: WorkerId
    port: int


class SpawnedWorker(Struct, frozen=True, kw_only=True):
    """Result of `worker_spawn`."""

    worker_id: WorkerId
    pid: int
    port: int
    model: ModelId
    devices: list[int]


class FileProgress(Struct, frozen=True, kw_only=True):
    """One file that is being fetched: bytes had and in all."""

    path: str
    bytes_done: int
    bytes_total: int | None


class DownloadProgress(Struct, frozen=True, kw_only=True):
    """Bytes had and in all, bytes per second, seconds to go; `current` are the files under way."""

    model: ModelId
    bytes_done: int
    bytes_total: int | None
    rate: float
    eta_s: float | None
    files_done: int = 0
    files_total: int = 0
    current: list[FileProgress] = []


# --- the events ----------------------------------------------------------------------------------------


class Event(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="action"):
    """What every event carries.

    `actor` is who said it (`queen`, `hive/<id>`, `worker/<id>`); `job_id` the job of this stream;
    `timestamp` RFC 3339 in UTC. `event_id` (`<n>-<i>`) stands only on the firehose; on a job's stream it
    is the SSE id. `repeated` marks what was rebuilt after a loss.
    """

    kind: ClassVar[Kind] = "narration"

    message: str
    actor: str
    job_id: JobId
    correlation_id: str
    timestamp: str
    event_id: str | None = None
    repeated: bool = False

    @property
    def action(self) -> str:
        return str(self.__struct_config__.tag)


class Narrated(Event, frozen=True, kw_only=True):
    """Narration. `formatted` is the line a terminal shows."""

    formatted: str


class Execute(Narrated, frozen=True, kw_only=True, tag="execute"):
    """The job has started."""


class InferStart(Narrated, frozen=True, kw_only=True, tag="infer_start"):
    """The hop the caller spoke to has taken an inference."""


class InferSchedule(Narrated, frozen=True, kw_only=True, tag="infer_schedule"):
    """The queen has decided where it runs."""

    data: Decision


class InferWorker(Narrated, frozen=True, kw_only=True, tag="infer_worker"):
    """The hive has handed it to a worker."""

    data: Placement


class InferRetry(Narrated, frozen=True, kw_only=True, tag="infer_retry"):
    """An attempt failed before it spoke; another place is tried."""

    data: dict[str, Any] = {}


class InferComplete(Narrated, frozen=True, kw_only=True, tag="infer_complete"):
    """Generation has ended."""

    data: InferResult


class OpenAIResponse(Narrated, frozen=True, kw_only=True, tag="openai_response"):
    """The engine has begun its answer; its body follows as `chunk` events."""

    data: OpenAIHead


class WorkerSpawnStart(Narrated, frozen=True, kw_only=True, tag="worker_spawn_start"):
    """The worker's process has been started."""

    data: dict[str, Any] = {}


class WorkerSpawnHealthCheck(Narrated, frozen=True, kw_only=True, tag="worker_spawn_health_check"):
    """The worker is alive and not ready yet."""

    data: dict[str, Any] = {}


class WorkerSpawnComplete(Narrated, frozen=True, kw_only=True, tag="worker_spawn_complete"):
    """The worker answers."""

    data: SpawnedWorker


class ModelDownloadStart(Narrated, frozen=True, kw_only=True, tag="model_download_start"):
    """A download has begun."""

    data: dict[str, Any] = {}


class ModelDownloadProgress(Narrated, frozen=True, kw_only=True, tag="model_download_progress"):
    """A download goes on; each replaces the one before."""

    data: DownloadProgress


class ModelDownloadComplete(Narrated, frozen=True, kw_only=True, tag="model_download_complete"):
    """The model lies in the models folder."""

    data: dict[str, Any] = {}


class Warning_(Narrated, frozen=True, kw_only=True, tag="warning"):
    """Something in the request is probably not what was meant."""

    data: dict[str, Any] = {}


class Error(Narrated, frozen=True, kw_only=True, tag="error"):
    """Why the job fails; the terminal event follows."""

    code: str
    retryable: bool
    data: dict[str, Any] = {}


class Gap(Event, frozen=True, kw_only=True, tag="gap"):
    """Firehose only: events were lost to this follower; it must read its jobs again."""

    job_id: str


class Token(Event, frozen=True, kw_only=True, tag="token"):
    """Output: `message` is the text, `index` counts a job's output from 0."""

    kind: ClassVar[Kind] = "output"

    index: Index
    data: TokenData | None = None


class Chunk(Event, frozen=True, kw_only=True, tag="chunk"):
    """Output: `data` is one raw OpenAI chunk, `message` the name of its server-sent event, if it has one."""

    kind: ClassVar[Kind] = "output"

    index: Index
    data: msgspec.Raw = msgspec.Raw(b"null")


class Terminal(Narrated, frozen=True, kw_only=True):
    """The last event of a job; `[DONE]` follows."""

    kind: ClassVar[Kind] = "terminal"


class ExecuteComplete(Terminal, frozen=True, kw_only=True, tag="execute_complete"):
    """The job completed; `data` is the operation's result."""

    data: Any = None


class ExecuteError(Terminal, frozen=True, kw_only=True, tag="execute_error"):
    """The job failed, as the `error` event before it tells."""

    code: str


class ExecuteCancelled(Terminal, frozen=True, kw_only=True, tag="execute_cancelled"):
    """The job was cancelled. Code: `cancelled`, `not_read`, `abandoned`, `owner_gone`."""

    code: str


class ExecuteTimeout(Terminal, frozen=True, kw_only=True, tag="execute_timeout"):
    """The job ran out of time; its state is failed, its code `timeout`."""

    code: Literal["timeout"]


class Narration(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event of any other action: free narration, or one of a newer version."""

    kind: ClassVar[Kind] = "narration"

    action: str
    message: str
    actor: str
    job_id: JobId
    correlation_id: str
    timestamp: str
    event_id: str | None = None
    repeated: bool = False
    formatted: str = ""
    data: Any = None


KnownEvent: TypeAlias = (
    Execute
    | InferStart
    | InferSchedule
    | InferWorker
    | InferRetry
    | InferComplete
    | OpenAIResponse
    | WorkerSpawnStart
    | WorkerSpawnHealthCheck
    | WorkerSpawnComplete
    | ModelDownloadStart
    | ModelDownloadProgress
    | ModelDownloadComplete
    | Warning_
    | Error
    | Gap
    | Token
    | Chunk
    | ExecuteComplete
    | ExecuteError
    | ExecuteCancelled
    | ExecuteTimeout
)
AnyEvent: TypeAlias = KnownEvent | Narration
TerminalEvent: TypeAlias = ExecuteComplete | ExecuteError | ExecuteCancelled | ExecuteTimeout

EVENTS: dict[str, type[Event]] = {str(t.__struct_config__.tag): t for t in get_args(KnownEvent)}

_decoder: msgspec.json.Decoder[KnownEvent] = msgspec.json.Decoder(KnownEvent)
_narration_decoder = msgspec.json.Decoder(Narration)
encode_event = msgspec.json.Encoder().encode


def decode_event(data: bytes | str) -> AnyEvent:
    """Decode one event.

    Raises:
        msgspec.DecodeError: it is not an event (not JSON, or a field every event has is missing).
    """
    try:
        return _decoder.decode(data)
    except msgspec.ValidationError as exc:
        try:
            narration = _narration_decoder.decode(data)
        except (UnicodeDecodeError, RecursionError) as bad:
            raise msgspec.DecodeError(str(bad)) from bad
        if narration.action in EVENTS:
            raise exc from None
        return narration
    except (UnicodeDecodeError, RecursionError) as exc:
        raise msgspec.DecodeError(str(exc)) from exc


def event_type(action: str) -> type[Event] | None:
    """Give the struct of a known action; free narration has none."""
    return EVENTS.get(action)
