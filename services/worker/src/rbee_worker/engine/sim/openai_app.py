"""The simulated engine's own HTTP app: enough of OpenAI's and vLLM's API to put a router in front of it.

Cheap on purpose, since it is measured against: a chunk is joined from bytes made once per request, and all
choices' tokens of a step leave in one send.
"""

import time
import uuid
from typing import TYPE_CHECKING, Any, Literal

import anyio
import msgspec
from msgspec import Struct
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rbee_contracts.errors import InvalidRequest, RbeeError
from rbee_contracts.events import InferResult, Usage
from rbee_contracts.operations import Infer
from rbee_worker.engine.base import Delta

if TYPE_CHECKING:
    from rbee_worker.engine.sim.engine import SimEngine

_DONE = b"data: [DONE]\n\n"
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_encode = msgspec.json.Encoder().encode


class _StreamOptions(Struct, frozen=True):
    include_usage: bool = False


class _ChatRequest(Struct, frozen=True):
    """The fields of a chat completion request that mean something here; others are passed over."""

    messages: list[dict[str, Any]]
    model: str | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logprobs: bool | None = None

    def operation(self, served_name: str) -> dict[str, Any]:
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        names = (
            "messages",
            "min_tokens",
            "n",
            "seed",
            "stop",
            "stop_token_ids",
            "include_stop_str_in_output",
        )
        fields = {name: getattr(self, name) for name in names}
        fields |= {"ignore_eos": self.ignore_eos, "logprobs": 1 if self.logprobs else None}
        return {"model": served_name, "max_tokens": wanted, **fields}


_decoder = msgspec.json.Decoder(_ChatRequest)


def build_app(engine: "SimEngine") -> Starlette:
    """Build the app of one engine."""
    created = int(time.time())

    async def models(_: Request) -> Response:
        max_model_len = engine.model.parameters.max_model_len
        model = {
            "id": engine.served_name, "object": "model", "created": created, "owned_by": "rbee",
            "root": engine.served_name, "parent": None, "max_model_len": max_model_len,
        }  # fmt: skip
        return _json({"object": "list", "data": [model]})

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(render_metrics(engine), media_type="text/plain; version=0.0.4")

    async def health(_: Request) -> Response:
        return Response(status_code=200 if engine.is_alive else 503)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", _ChatCompletions(engine), methods=["POST"]),
            Route("/v1/models", models),
            Route("/metrics", metrics),
            Route("/health", health),
        ]
    )


def render_metrics(engine: "SimEngine") -> str:
    """Write the metrics under vLLM's names and labels, in Prometheus's text format."""
    load, counters = engine.load(), engine.model.counters
    labels = f'{{engine="0",model_name="{engine.served_name}"}}'
    values: list[tuple[Literal["gauge", "counter"], str, float]] = [
        ("gauge", "num_requests_running", load.running),
        ("gauge", "num_requests_waiting", load.waiting),
        ("gauge", "kv_cache_usage_perc", load.kv_cache_usage),
        ("counter", "prefix_cache_queries", counters.prefix_queries),
        ("counter", "prefix_cache_hits", counters.prefix_hits),
        ("counter", "prompt_tokens", counters.prompt),
        ("counter", "generation_tokens", counters.generated),
    ]
    lines = []
    for kind, name, value in values:
        full = f"vllm:{name}_total" if kind == "counter" else f"vllm:{name}"
        lines.append(f"# TYPE {full} {kind}\n{full}{labels} {float(value)}\n")
    return "".join(lines)


class _ChatCompletions:
    """`POST /v1/chat/completions`, as a plain ASGI app: one send per step, no response object."""

    def __init__(self, engine: "SimEngine") -> None:
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
            request = _decoder.decode(body)
            if request.model not in (None, self._engine.served_name):
                error = _error(404, f"The model `{request.model}` does not exist.", "NotFoundError")
                await error(scope, receive, send)
                return
            op = msgspec.convert(request.operation(self._engine.served_name), Infer)
            mailbox = self._engine.submit(op)
        except ClientDisconnect:
            return
        except (InvalidRequest, msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
            await _error(400, str(exc), "BadRequestError")(scope, receive, send)
            return
        except RbeeError as exc:
            await _error(500, exc.details, "InternalServerError")(scope, receive, send)
            return
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_cancel_on_disconnect, receive, group.cancel_scope)
                if request.stream:
                    await self._stream(request, op, mailbox, send)
                else:
                    await (await self._answer(op, mailbox))(scope, receive, send)
                group.cancel_scope.cancel()
        finally:
            self._engine.abort(mailbox)

    async def _stream(self, request: _ChatRequest, op: Infer, mailbox: Any, send: Send) -> None:
        base = {
            "id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk",
            "created": int(time.time()), "model": self._engine.served_name,
        }  # fmt: skip
        choices = range(op.n or 1)
        # {…,"choices":[{"index":0,"delta":{"content":"TEXT"},"logprobs":null,"finish_reason":null}]}
        head = b"data: " + _encode(base)[:-1] + b',"choices":[{"index":'
        heads = [head + b"%d" % c + b',"delta":{"content":' for c in choices]
        tail = b'},"logprobs":null,"finish_reason":null}]}\n\n'
        empty = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        first = b"".join(head + b"%d" % choice + empty for choice in choices)
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        while not mailbox.is_finished:
            try:
                items = await mailbox.step()
            except RbeeError as exc:
                event = {"error": {"message": exc.details, "type": "InternalServerError", "code": 500}}
                data = first + b"data: " + _encode(event) + b"\n\n" + _DONE
                await send({"type": "http.response.body", "body": data, "more_body": False})
                return
            parts = [first]
            first = b""
            for item in items:
                if isinstance(item, Delta):
                    parts += (heads[item.choice], _encode(item.text), tail)
                else:
                    for choice, reason, stop_reason in _ends(item):
                        ending: dict[str, Any] = {
                            "delta": {},
                            "logprobs": None,
                            "finish_reason": reason,
                            "stop_reason": stop_reason,
                        }
                        parts.append(head + b"%d," % choice + _encode(ending)[1:] + b"]}\n\n")
                    if request.stream_options is not None and request.stream_options.include_usage:
                        usage = base | {"choices": [], "usage": item.usage}
                        parts.append(b"data: " + _encode(usage) + b"\n\n")
                    parts.append(_DONE)
            await send(
                {
                    "type": "http.response.body",
                    "body": b"".join(parts),
                    "more_body": not mailbox.is_finished,
                }
            )

    async def _answer(self, op: Infer, mailbox: Any) -> Response:
        texts: list[list[str]] = [[] for _ in range(op.n or 1)]
        result: InferResult | None = None
        while result is None:
            try:
                items = await mailbox.step()
            except RbeeError as exc:
                return _error(500, exc.details, "InternalServerError")
            for item in items:
                if isinstance(item, Delta):
                    texts[item.choice].append(item.text)
                else:
                    result = item
        choices = [
            {
                "index": choice,
                "message": {"role": "assistant", "content": "".join(texts[choice])},
                "logprobs": None,
                "finish_reason": reason,
                "stop_reason": stop_reason,
            }
            for choice, reason, stop_reason in _ends(result)
        ]
        usage: Usage = result.usage
        return _json(
            {
                "id": f"chatcmpl-{uuid.uuid4().hex}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": self._engine.served_name,
                "choices": choices,
                "usage": usage,
            }
        )


def _ends(result: InferResult) -> list[tuple[int, str, int | str | None]]:
    if not result.choices:
        return [(0, result.finish_reason, result.stop_reason)]
    return [(end.choice, end.finish_reason, end.stop_reason) for end in result.choices]


async def _cancel_on_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _json(value: Any, status: int = 200) -> Response:
    return Response(_encode(value), status_code=status, media_type="application/json")


def _error(status: int, message: str, kind: str) -> Response:
    return _json({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)
