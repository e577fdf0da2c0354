"""The table of the queen's routes: what each takes and what it answers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from rbee_contracts.errors import ErrorBody
from rbee_contracts.jobs import JobAccepted, JobCancelled, JobPage, JobRecord, JobTicket
from rbee_contracts.nodes import HiveReady, ServiceInfo
from rbee_contracts.operations import AnyOperation
from rbee_queen.metrics.targets import Target
from rbee_queen.openai.endpoints import AUDIO, ENDPOINTS, MODELS, PREFIXES, Dialect
from rbee_queen.openai.models import Model, ModelCatalog

JSON = "application/json"
EVENTS = "text/event-stream"
FORM = "multipart/form-data"


class Health(Struct, frozen=True):
    """Answer of `/health`."""

    status: Literal["ok"]


class Ready(Struct, frozen=True, omit_defaults=True):
    """Answer of `/ready`. `reason` says why a service takes no work now."""

    ready: bool
    reason: str | None = None


class Taken(Struct, frozen=True):
    """Answer of `/v1/hive/ready`."""

    status: Literal["ok"]


class OpenAIErrorInfo(Struct, frozen=True):
    """What went wrong. `code` is rbee's own or, in the engine's words, an HTTP status."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class OpenAIError(Struct, frozen=True):
    """Every error of the OpenAI routes."""

    error: OpenAIErrorInfo


class AnthropicErrorInfo(Struct, frozen=True):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(Struct, frozen=True):
    """Every error of the Anthropic routes."""

    type: Literal["error"]
    error: AnthropicErrorInfo


class ModelRequest(Struct, frozen=True):
    """A request to a model: any body that vLLM's own endpoint takes, which gets it as it stands.

    `model` names the model or an alias; it may be left out while only one model is served.
    """

    model: str | None = None


class Parameter(Struct, frozen=True, kw_only=True):
    """One parameter of a route. `schema` is a JSON schema."""

    name: str
    place: Literal["path", "query", "header"]
    description: str
    schema: Mapping[str, Any]


Content: TypeAlias = Mapping[str, Any]
"""The type of a body by its media type; None where its shape is not told."""


class Reply(Struct, frozen=True, kw_only=True):
    """One answer that a route may give."""

    status: int
    description: str
    content: Content = {}


class Operation(Struct, frozen=True, kw_only=True):
    """One method of one path."""

    method: Literal["get", "post", "delete"]
    path: str
    tag: str
    summary: str
    replies: Sequence[Reply]
    description: str = ""
    parameters: Sequence[Parameter] = ()
    request: Content = {}
    is_open: bool = False


def _errors(body: type, statuses: dict[int, str]) -> list[Reply]:
    return [
        Reply(status=status, description=text, content={JSON: body})
        for status, text in sorted((COMMON_ERRORS | statuses).items())
    ]


COMMON_ERRORS: dict[int, str] = {
    400: "The request is not what this route takes.",
    401: "The token is missing or wrong.",
    403: "The host or the page that asks is not allowed.",
    408: "The request was not here as a whole in time.",
    413: "The body is too large.",
    431: "The request line and its headers are too large.",
    500: "A fault of rbee; its log has the cause under the correlation id.",
    503: "It cannot be served now; `Retry-After` says when to try again.",
}
"""What any route may answer."""

JOB_ID = Parameter(
    name="job_id", place="path", description="`job-<uuid>`.", schema={"type": "string", "minLength": 1}
)
LAST_EVENT_ID = Parameter(
    name="Last-Event-ID",
    place="header",
    description="The id of the last event that was read; the stream goes on after it.",
    schema={"type": "string"},
)
CORRELATION = Parameter(
    name="X-Correlation-ID",
    place="header",
    description="Taken where it is 1 to 64 of `[A-Za-z0-9._-]`, else made; echoed, and in every log line.",
    schema={"type": "string"},
)
DEADLINE = Parameter(
    name="X-Deadline-Ms",
    place="header",
    description="Milliseconds that the caller has left; the job times out after them.",
    schema={"type": "string", "pattern": "^[0-9]{1,12}$"},
)
TRACEPARENT = Parameter(
    name="traceparent",
    place="header",
    description="The caller's place in its trace, by W3C Trace Context; ignored where it is malformed.",
    schema={"type": "string"},
)


def _ok(description: str, body: Any, media_type: str = JSON, status: int = 200) -> Reply:
    return Reply(status=status, description=description, content={media_type: body})


def _common() -> list[Operation]:
    return [
        Operation(
            method="get",
            path="/health",
            tag="service",
            summary="Whether the queen is alive",
            replies=[_ok("It is.", Health), *_errors(ErrorBody, {})],
            is_open=True,
        ),
        Operation(
            method="get",
            path="/ready",
            tag="service",
            summary="Whether the queen takes work",
            replies=[
                _ok("It does.", Ready),
                *(reply for reply in _errors(ErrorBody, {}) if reply.status != 503),
                _ok("It does not.", Ready, status=503),
            ],
        ),
        Operation(
            method="get",
            path="/v1/info",
            tag="service",
            summary="Name, version and uptime",
            replies=[_ok("What this service is.", ServiceInfo), *_errors(ErrorBody, {})],
        ),
        Operation(
            method="get",
            path="/metrics",
            tag="service",
            summary="What the queen counts and measures",
            description="In Prometheus' text format.",
            replies=[_ok("The metrics.", None, "text/plain"), *_errors(ErrorBody, {})],
        ),
        Operation(
            method="get",
            path="/v1/metrics/targets",
            tag="service",
            summary="Where Prometheus finds every service of the cluster",
            description="For Prometheus' `http_sd_configs`.",
            replies=[_ok("Targets and their labels.", list[Target]), *_errors(ErrorBody, {})],
        ),
        Operation(
            method="get",
            path="/openapi.json",
            tag="service",
            summary="This document",
            replies=[_ok("An OpenAPI document.", None), *_errors(ErrorBody, {})],
        ),
        Operation(
            method="get",
            path="/docs",
            tag="service",
            summary="This document as a page",
            replies=[_ok("A page.", None, "text/html"), *_errors(ErrorBody, {})],
        ),
    ]


def _jobs() -> list[Operation]:
    unknown = {404: "No job has this id."}
    gone = {410: "Its output is no longer kept."}
    return [
        Operation(
            method="post",
            path="/v1/jobs",
            tag="jobs",
            summary="Submit an operation",
            description="It starts when its stream is first read, or at once with `Prefer: respond-async`.",
            parameters=[
                Parameter(
                    name="Prefer",
                    place="header",
                    description="`respond-async`: the job starts at once and runs whether or not it is read.",
                    schema={"enum": ["respond-async"]},
                ),
                Parameter(
                    name="Idempotency-Key",
                    place="header",
                    description="The same key and the same operation give the same job.",
                    schema={"type": "string", "pattern": "^[A-Za-z0-9._:/-]{1,128}$"},
                ),
                CORRELATION,
                DEADLINE,
                TRACEPARENT,
            ],
            request={JSON: AnyOperation},
            replies=[
                _ok("The job.", JobAccepted),
                _ok("The job, which has been started.", JobAccepted, status=202),
                *_errors(
                    ErrorBody,
                    {
                        409: "The key was used for another operation.",
                        415: "The body is of another media type.",
                        501: "This version cannot execute the operation.",
                    },
                ),
            ],
        ),
        Operation(
            method="get",
            path="/v1/jobs",
            tag="jobs",
            summary="List jobs, newest first",
            parameters=[
                Parameter(
                    name="state",
                    place="query",
                    description="Only jobs in this state.",
                    schema={"enum": ["pending", "running", "completed", "failed", "cancelled"]},
                ),
                Parameter(
                    name="operation",
                    place="query",
                    description="Only jobs of this operation.",
                    schema={"type": "string"},
                ),
                Parameter(
                    name="limit",
                    place="query",
                    description="How many at most (50).",
                    schema={"type": "integer", "minimum": 1, "maximum": 1000},
                ),
                Parameter(
                    name="cursor",
                    place="query",
                    description="The `next_cursor` of the page before.",
                    schema={"type": "string", "pattern": "^[0-9]{1,18}$"},
                ),
            ],
            replies=[_ok("A page of records.", JobPage), *_errors(ErrorBody, {})],
        ),
        Operation(
            method="get",
            path="/v1/jobs/{job_id}",
            tag="jobs",
            summary="The record of a job",
            parameters=[JOB_ID],
            replies=[_ok("The record.", JobRecord), *_errors(ErrorBody, unknown)],
        ),
        Operation(
            method="delete",
            path="/v1/jobs/{job_id}",
            tag="jobs",
            summary="Cancel a job",
            parameters=[JOB_ID],
            replies=[
                _ok("It is cancelled.", JobCancelled),
                *_errors(ErrorBody, unknown | {409: "It has completed or failed."}),
            ],
        ),
        Operation(
            method="get",
            path="/v1/jobs/{job_id}/stream",
            tag="jobs",
            summary="The events of a job",
            description="Server-sent events, from the first or from after `Last-Event-ID`, then `[DONE]`.",
            parameters=[
                JOB_ID,
                LAST_EVENT_ID,
                Parameter(
                    name="ticket",
                    place="query",
                    description="In place of the token, for a browser's EventSource.",
                    schema={"type": "string"},
                ),
            ],
            replies=[
                _ok("The events.", None, EVENTS),
                Reply(status=204, description="All was read, and there will be no more."),
                *_errors(ErrorBody, unknown | gone),
            ],
        ),
        Operation(
            method="post",
            path="/v1/jobs/{job_id}/ticket",
            tag="jobs",
            summary="A URL of a job's stream that needs no token",
            parameters=[JOB_ID],
            replies=[_ok("The URL.", JobTicket), *_errors(ErrorBody, unknown)],
        ),
        Operation(
            method="get",
            path="/v1/events",
            tag="jobs",
            summary="The events of all jobs",
            description="Server-sent events, without end.",
            parameters=[
                LAST_EVENT_ID,
                Parameter(
                    name="output",
                    place="query",
                    description="`1`: output and results too.",
                    schema={"type": "string"},
                ),
            ],
            replies=[_ok("The events.", None, EVENTS), *_errors(ErrorBody, {})],
        ),
    ]


def _hives() -> list[Operation]:
    return [
        Operation(
            method="post",
            path="/v1/hive/ready",
            tag="hives",
            summary="Announce a hive",
            request={JSON: HiveReady},
            replies=[
                _ok("The queen follows it from now on.", Taken),
                *_errors(ErrorBody, {409: "Another hive of this id is online."}),
            ],
        ),
        Operation(
            method="get",
            path="/v1/heartbeats/stream",
            tag="hives",
            summary="The cluster, every second",
            description="Server-sent events named `heartbeat`, without end.",
            replies=[_ok("The heartbeats.", None, EVENTS), *_errors(ErrorBody, {})],
        ),
    ]


_SUMMARIES = {
    AUDIO: "Write down what is said",
    "/v1/chat/completions": "Chat",
    "/v1/completions": "Complete a text",
    "/v1/detokenize": "Tokens as text",
    "/v1/embeddings": "Embed texts",
    "/v1/messages": "Chat, as Anthropic's clients ask for it",
    "/v1/messages/count_tokens": "Count a message's tokens",
    "/v1/rerank": "Order documents by a query",
    "/v1/responses": "Respond",
    "/v1/score": "Compare texts",
    "/v1/tokenize": "Text as tokens",
}
_MODEL_ERRORS = {
    404: "No such model here; names like it are told. Or the engine has no such endpoint for it.",
    415: "The body is of another media type.",
    422: "The engine cannot process the request.",
    429: "The engine is too busy.",
    499: "The job was cancelled.",
    501: "The engine does not implement this.",
    504: "The request ran out of time.",
}
_STREAMING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", AUDIO})


def _front_door() -> list[Operation]:
    found = []
    for prefix in PREFIXES:
        for path, dialect in ENDPOINTS.items():
            error = OpenAIError if dialect is Dialect.OPENAI else AnthropicError
            answer: dict[str, Any] = {JSON: None}
            if path in _STREAMING:
                answer[EVENTS] = None
            if path == AUDIO:
                answer["text/plain"] = None
            found.append(
                Operation(
                    method="post",
                    path=prefix + path,
                    tag="models",
                    summary=_SUMMARIES[path],
                    description="vLLM's own endpoint, run as a job: its id is in the header `X-Job-ID`.",
                    parameters=[CORRELATION, DEADLINE, TRACEPARENT],
                    request={FORM: None} if path == AUDIO else {JSON: ModelRequest},
                    replies=[
                        Reply(status=200, description="vLLM's own answer.", content=answer),
                        *_errors(error, _MODEL_ERRORS),
                    ],
                )
            )
        model_id = Parameter(
            name="model_id",
            place="path",
            description="It may have a `/`.",
            schema={"type": "string", "minLength": 1},
        )
        found += [
            Operation(
                method="get",
                path=prefix + MODELS,
                tag="models",
                summary="The models that run, or lie on some hive",
                replies=[_ok("The list.", ModelCatalog), *_errors(OpenAIError, {})],
            ),
            Operation(
                method="get",
                path=prefix + MODELS + "/{model_id}",
                tag="models",
                summary="One model",
                parameters=[model_id],
                replies=[_ok("The model.", Model), *_errors(OpenAIError, {404: "There is none."})],
            ),
        ]
    return found


OPERATIONS: list[Operation] = [*_common(), *_jobs(), *_hives(), *_front_door()]
"""Every route of the queen; a test compares this with the app's own."""
