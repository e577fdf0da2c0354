"""A front door's request as an operation: only `model` is read of its body, which stays as it is. Pure."""

import base64

import msgspec

from rbee_contracts.errors import BodyTooLarge, InvalidRequest
from rbee_contracts.operations import OpenAI
from rbee_queen.openai.endpoints import AUDIO
from rbee_queen.openai.errors import UnsupportedMediaType
from rbee_queen.openai.forms import model_in_form

MAX_CONTENT_TYPE_CHARS = 256

_encode = msgspec.json.Encoder().encode
_skim = msgspec.json.Decoder(msgspec.Raw).decode


def operation_of(endpoint: str, content_type: str, body: bytes, max_body_bytes: int) -> OpenAI:
    """Make the operation of a request.

    Args:
        content_type: the header, empty where there is none.
        max_body_bytes: what the services take; a form grows by a third on its way to the worker.

    Raises:
        UnsupportedMediaType: the body is of another type than the endpoint takes.
        InvalidRequest: it is not of the type that it says, or names no model by its `model`.
        BodyTooLarge: it is too large to be passed on.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if endpoint == AUDIO:
        if media_type != "multipart/form-data":
            raise UnsupportedMediaType(_media_type(endpoint, "multipart/form-data", media_type))
        return _form(endpoint, content_type, body, max_body_bytes)
    if media_type != "application/json":
        raise UnsupportedMediaType(_media_type(endpoint, "application/json", media_type))
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as exc:
            raise InvalidRequest(f"The body is not UTF-8: {exc.reason} at byte {exc.start}.") from exc
    try:
        raw = _skim(body)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise InvalidRequest(f"The body is not JSON: {exc}") from exc
    try:
        return OpenAI(endpoint=endpoint, body=raw)
    except ValueError as exc:
        raise InvalidRequest(str(exc).replace("`body`", "The body")) from exc


def _form(endpoint: str, content_type: str, body: bytes, max_body_bytes: int) -> OpenAI:
    largest = max_body_bytes * 3 // 4
    if len(body) > largest:
        raise BodyTooLarge(
            f"The form has {len(body)} bytes; at most {largest} can be passed on (--max-body-bytes)."
        )
    if len(content_type) > MAX_CONTENT_TYPE_CHARS or not (
        content_type.isascii() and content_type.isprintable()
    ):
        raise InvalidRequest("The Content-Type is too long, or not ASCII.")
    model = model_in_form(body, content_type)
    named = {} if model is None else {"model": model}
    return OpenAI(
        endpoint=endpoint,
        body=msgspec.Raw(_encode(named)),
        body_base64=base64.b64encode(body).decode(),
        content_type=content_type,
        model=model,
    )


def _media_type(endpoint: str, wanted: str, given: str) -> str:
    came = f"came as {given[:80]!r}" if given else "came without a Content-Type"
    return f"{endpoint} takes {wanted}; the body {came}."
