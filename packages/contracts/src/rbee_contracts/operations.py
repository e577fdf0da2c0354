"""Every operation that `POST /v1/jobs` takes, one struct each, and how a body becomes one."""

import difflib
import hashlib
import itertools
from typing import Annotated, Any, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta, Struct

from rbee_contracts.errors import InvalidRequest
from rbee_contracts.ids import (
    CORRELATION_ID_PATTERN,
    HIVE_ID_PATTERN,
    MODEL_ID_PATTERN,
    CorrelationId,
    HiveId,
    ModelId,
    WorkerId,
)

MAX_PROMPT_CHARS = 4_000_000
MAX_TOKENS = 10_000_000
MAX_UNKNOWN_NAMED = 20
"""Unknown fields that are named to the caller; a body may have a million."""


Seconds = Annotated[float, Meta(gt=0, le=7 * 86_400)]
DeviceIndex = Annotated[int, Meta(ge=0, le=1023)]
Pid = Annotated[int, Meta(ge=2, le=2**22)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TokenCount = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
OpenAIModel = Annotated[str, Meta(min_length=1, max_length=290)]
WorkerArg = Annotated[str, Meta(max_length=4096, pattern=r"^[^\x00]*\Z")]


def _tag(class_name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in class_name).lstrip("_")


class _Addressed(Struct, frozen=True):
    """All that is read of a body that goes to the engine as it stands."""

    model: OpenAIModel | None = None


_model_decoder = msgspec.json.Decoder(_Addressed)


def _model_of(body: msgspec.Raw) -> str | None:
    """Give the `model` that a body names.

    Raises:
        ValueError: it is no name.
    """
    try:
        return _model_decoder.decode(body).model
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise ValueError(f"`body`: {exc}") from exc


class Operation(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="operation", tag=_tag):
    """What a job is asked to do.

    `timeout_s`: seconds the job may run from its start before it ends with `execute_timeout`;
    without it the operation's own limit holds.
    """

    timeout_s: Seconds | None = None

    @property
    def name(self) -> str:
        """The wire name, e.g. `worker_spawn`."""
        return str(self.__struct_config__.tag)


class HiveOperation(Operation, frozen=True, kw_only=True):
    """An operation that one hive executes; sent to it directly, or to the queen with `hive_id`."""

    hive_id: HiveId | None = None


class Infer(Operation, frozen=True, kw_only=True):
    """Generate text with a running worker of `model`. Needs `prompt` or `messages`.

    The sampling parameters are vLLM's, by their usual names; one that is left out keeps the default of
    the model's `generation_config.json`, and else vLLM's. `max_tokens` defaults to what is left of the
    model's context. A job started by its reader is cancelled when its last reader has been gone for
    `resume_window_s` seconds. `hive_id` and `worker_id` pin the request to a place.
    """

    model: ModelId
    prompt: (
        Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)]
        | Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_TOKENS)]
        | None
    ) = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=16_384)] | None = None
    hive_id: HiveId | None = None
    worker_id: WorkerId | None = None
    resume_window_s: Annotated[float, Meta(ge=0, le=3600)] = 5.0

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    min_tokens: TokenCount | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=64)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=1024)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=1_000_000)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Meta(pattern=r"^[0-9]{1,10}\Z")], Annotated[float, Meta(ge=-100, le=100)]],
            Meta(max_length=1024),
        ]
        | None
    ) = None
    logprobs: Annotated[int, Meta(ge=0, le=1024)] | None = None
    logprob_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    stream_interval: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    skip_reading_prefix_cache: bool | None = None
    watermarking: bool | None = None
    thinking_token_budget: TokenCount | None = None
    structured_outputs: dict[str, Any] | None = None
    repetition_detection: dict[str, Any] | None = None
    extra_args: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of `prompt` and `messages`")


class OpenAI(Operation, frozen=True, kw_only=True, tag="openai"):
    """Pass one raw request body to an endpoint of the worker's OpenAI app.

    `body` is a JSON object that goes to the engine as it stands, byte for byte; `model` says which model's
    worker that is, and is read from `body` where it is left out. What is no JSON (a form with audio) goes in
    `body_base64` with its `content_type`; `body` then holds only the `model`.
    """

    endpoint: Annotated[str, Meta(pattern=r"^/v1/[a-z0-9_/-]{1,100}\Z")]
    body: msgspec.Raw
    body_base64: Annotated[str, Meta(pattern=r"^[A-Za-z0-9+/]*={0,2}\Z")] | None = None
    content_type: Annotated[str, Meta(pattern=r"^[ -~]{1,256}\Z")] = "application/json"
    model: OpenAIModel | None = None
    hive_id: HiveId | None = None
    worker_id: WorkerId | None = None

    def __post_init__(self) -> None:
        if bytes(memoryview(self.body)[:1]) != b"{":
            raise ValueError("`body` must be a JSON object")
        if self.model is None:
            msgspec.structs.force_setattr(self, "model", _model_of(self.body))


class Status(Operation, frozen=True, kw_only=True):
    """Tell the state of the whole cluster: hives, their devices, workers and models."""


class HiveList(Operation, frozen=True, kw_only=True):
    """List the hives that the queen knows."""


class HiveGet(Operation, frozen=True, kw_only=True):
    """Tell everything the queen knows of one hive."""

    hive_id: HiveId


class HiveForget(Operation, frozen=True, kw_only=True):
    """Take a hive that is lost off the queen's list, for good. One that is there after all announces itself
    and is listed again."""

    hive_id: HiveId


class ScheduleExplain(Operation, frozen=True, kw_only=True):
    """Tell where an `infer` of `model` would run now, and why, without running it."""

    model: ModelId
    hive_id: HiveId | None = None
    worker_id: WorkerId | None = None


class QueenCheck(Operation, frozen=True, kw_only=True):
    """Check the queen itself, step by step, narrating each finding."""


class WorkerSpawn(HiveOperation, frozen=True, kw_only=True):
    """Start a worker that serves `model`. Several `devices` set the tensor-parallel size, divided by the
    pipeline-parallel and data-parallel sizes in `worker_args`.

    `worker` chooses the kind of device; without it, CUDA where the hive has a GPU, else the CPU.
    `worker_args` go to the engine unchanged, as on vLLM's command line.
    """

    model: ModelId
    worker: Literal["cuda", "cpu"] | None = None
    device: DeviceIndex | None = None
    devices: Annotated[list[DeviceIndex], Meta(min_length=1, max_length=64)] | None = None
    worker_args: Annotated[list[WorkerArg], Meta(max_length=256)] = []

    def __post_init__(self) -> None:
        if self.device is not None and self.devices is not None:
            raise ValueError("give `device` or `devices`, not both")
        if self.devices is not None and len(set(self.devices)) != len(self.devices):
            raise ValueError("`devices` names a device twice")


class WorkerList(HiveOperation, frozen=True, kw_only=True):
    """List the hive's workers."""


class WorkerGet(HiveOperation, frozen=True, kw_only=True):
    """Tell one worker's state."""

    worker_id: WorkerId


class WorkerStop(HiveOperation, frozen=True, kw_only=True):
    """Stop a worker: SIGTERM, a grace of `grace_s` seconds in which it drains, then SIGKILL of its group."""

    worker_id: WorkerId
    grace_s: Annotated[float, Meta(ge=0, le=3600)] = 30.0


class WorkerDrain(HiveOperation, frozen=True, kw_only=True):
    """Let a worker finish what it has and give it nothing new; `draining` false takes that back."""

    worker_id: WorkerId
    draining: bool = True


class WorkerLog(HiveOperation, frozen=True, kw_only=True):
    """Give the last `lines` lines of a worker's log; with `follow` go on until cancelled or it has ended."""

    worker_id: WorkerId
    lines: Annotated[int, Meta(ge=0, le=100_000)] = 200
    follow: bool = False


class LogSearch(HiveOperation, frozen=True, kw_only=True):
    """Give the log lines that belong to one request, of every service that it went through.

    The queen tells her own and asks every hive, or only the one that is named; a hive tells its own and those
    of its workers, living and gone, with what their engines have logged under the request's id. `since_s`
    leaves out what is older than so many seconds by the clock of the machine that has it; `level` what is
    less grave. Of too many lines each hive gives its newest `limit`.
    """

    correlation_id: CorrelationId
    since_s: Seconds | None = None
    level: Literal["debug", "info", "warning", "error"] = "debug"
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 2000


class WorkerProcessList(HiveOperation, frozen=True, kw_only=True):
    """List the machine's worker processes as the operating system sees them."""


class WorkerProcessGet(HiveOperation, frozen=True, kw_only=True):
    """Tell one process as the operating system sees it."""

    pid: Pid


class WorkerProcessDelete(HiveOperation, frozen=True, kw_only=True):
    """End one process that the hive can prove to be its own."""

    pid: Pid


class ModelDownload(HiveOperation, frozen=True, kw_only=True):
    """Fetch a model's files into the hive's models folder; what lies there already is not fetched again.

    `source`: `hive` takes it from another hive of the cluster, `hub` from the model hub, `auto` from
    another hive where one has it and else from the hub. `allow_patterns` as in huggingface_hub.
    """

    model: ModelId
    revision: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")] | None = None
    allow_patterns: Annotated[list[Annotated[str, Meta(max_length=256)]], Meta(max_length=64)] | None = None
    source: Literal["auto", "hub", "hive"] = "auto"


class ModelGet(HiveOperation, frozen=True, kw_only=True):
    """Tell what lies on the hive of one model."""

    model: ModelId


class ModelDelete(HiveOperation, frozen=True, kw_only=True):
    """Remove a model's files from the hive."""

    model: ModelId


class ModelLoad(HiveOperation, frozen=True, kw_only=True):
    """Bring a model into device memory: wake a sleeping worker of it, else spawn one."""

    model: ModelId


class ModelUnload(HiveOperation, frozen=True, kw_only=True):
    """Take a model out of device memory: its workers sleep where the device can, else they stop."""

    model: ModelId


class ModelList(HiveOperation, frozen=True, kw_only=True):
    """List the models that lie on the hive."""


class DeviceList(HiveOperation, frozen=True, kw_only=True):
    """List the hive's devices."""


class HiveDrain(HiveOperation, frozen=True, kw_only=True):
    """Let the hive finish what it has and give it nothing new; `draining` false takes that back."""

    draining: bool = True


class HiveCheck(HiveOperation, frozen=True, kw_only=True):
    """Check the hive itself, step by step, narrating each finding."""


QueenOperation: TypeAlias = Status | HiveList | HiveGet | HiveForget | ScheduleExplain | QueenCheck
OnHive: TypeAlias = (
    WorkerSpawn
    | WorkerList
    | WorkerGet
    | WorkerStop
    | WorkerDrain
    | WorkerLog
    | LogSearch
    | WorkerProcessList
    | WorkerProcessGet
    | WorkerProcessDelete
    | ModelDownload
    | ModelGet
    | ModelDelete
    | ModelLoad
    | ModelUnload
    | ModelList
    | DeviceList
    | HiveDrain
    | HiveCheck
)
AnyOperation: TypeAlias = Infer | OpenAI | QueenOperation | OnHive

OPERATIONS: dict[str, type[Operation]] = {str(t.__struct_config__.tag): t for t in get_args(AnyOperation)}

# A worker id has the same pattern as a hive id.
_PATTERN_WORDS = {
    MODEL_ID_PATTERN: "a model id (a directory name in the models folder, or org/name[@revision])",
    CORRELATION_ID_PATTERN: "a correlation id (1 to 64 letters, digits, '.', '_' and '-')",
    HIVE_ID_PATTERN: "an id of 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit",
}

_decoder: msgspec.json.Decoder[AnyOperation] = msgspec.json.Decoder(AnyOperation)
_encoder = msgspec.json.Encoder()
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_text_decoder = msgspec.json.Decoder(str)


def encode_operation(operation: Operation) -> bytes:
    """Encode an operation as the JSON body of `POST /v1/jobs`."""
    return _encoder.encode(operation)


def operation_digest(operation: Operation) -> bytes:
    """Give the SHA-256 of an operation: equal for equal operations, whatever their JSON looked like."""
    return hashlib.sha256(encode_operation(operation)).digest()


def decode_operation(body: bytes) -> AnyOperation:
    """Decode the JSON body of `POST /v1/jobs`.

    Raises:
        InvalidRequest: for every body that is not an operation, whatever is wrong with it. Its code is
            `invalid_json`, `invalid_operation` (none, or unknown) or `invalid_field`.
    """
    try:
        operation = _decoder.decode(body)
        # What decodes may still not encode (integers beyond 64 bits inside free-form fields), and
        # every operation is encoded again for the hop below.
        _encoder.encode(operation)
    except msgspec.ValidationError as exc:
        raise _explain(body, exc) from exc
    except (msgspec.MsgspecError, UnicodeError) as exc:
        raise _invalid_json(str(exc)) from exc
    except RecursionError as exc:
        raise _invalid_json("the body is nested too deeply") from exc
    except OverflowError as exc:
        raise InvalidRequest(
            "A number in the body is beyond 64 bits.", code="invalid_field", title="Invalid field"
        ) from exc
    return operation


def unknown_fields(body: bytes, operation: Operation) -> dict[str, str | None]:
    """Find the fields of `body` that `operation` does not know, each with the likeliest meant name.

    At most `MAX_UNKNOWN_NAMED` of them. `body` must have decoded to `operation`.

    Raises:
        InvalidRequest: a name is not UTF-8, which decoding passes over.
    """
    known = set(operation.__struct_fields__) | {"operation"}
    try:
        fields = _fields_decoder.decode(body)
    except UnicodeError as exc:
        raise _invalid_json(str(exc)) from exc
    unknown = itertools.islice((name for name in fields if name not in known), MAX_UNKNOWN_NAMED)
    return {
        name: next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None) for name in unknown
    }


def _invalid_json(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"The body must be one JSON object with an `operation`: {reason}",
        code="invalid_json",
        title="Invalid JSON",
    )


def _readable(exc: msgspec.ValidationError) -> str:
    """Say in words what msgspec says as a regular expression."""
    text = str(exc)
    if len(text) > 500:  # an enum's error quotes the whole value
        text = f"{text[:400]} … {text[-80:]}"
    for pattern, words in _PATTERN_WORDS.items():
        text = text.replace(f"`str` matching regex {pattern!r}", words)
    return text


def _explain(body: bytes, exc: msgspec.ValidationError) -> InvalidRequest:
    """Tell an unknown operation from a wrong field, which msgspec reports alike."""
    try:
        raw = _fields_decoder.decode(body).get("operation")
        name = None if raw is None else _text_decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        name = ""
    if name is None:
        details = 'Missing field: operation. It names what to do, e.g. "infer".'
        return InvalidRequest(details, code="invalid_operation", title="Invalid operation")
    if name and name not in OPERATIONS:
        near = difflib.get_close_matches(name, OPERATIONS, n=1)
        hint = f". Did you mean {near[0]}?" if near else ""
        return InvalidRequest(
            f"Unknown operation: {name[:100]}{hint}", code="invalid_operation", title="Invalid operation"
        )
    if name:
        return InvalidRequest(f"{name}: {_readable(exc)}", code="invalid_field", title="Invalid field")
    return InvalidRequest(str(exc), code="invalid_operation", title="Invalid operation")
