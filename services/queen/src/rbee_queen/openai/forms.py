"""The `model` field of a multipart form, found in its bytes; the rest of the form is left as it is. Pure."""

import re
from typing import NamedTuple

from rbee_contracts.errors import InvalidRequest

MAX_MODEL_BYTES = 290

_boundary = re.compile(r'boundary=(?:"([^"]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
_disposition = re.compile(
    rb'content-disposition:[ \t]*form-data[ \t]*;(?:[^\r\n]*;)?[ \t]*name="model"', re.IGNORECASE
)


class _Span(NamedTuple):
    start: int
    end: int


def model_in_form(form: bytes, content_type: str) -> str | None:
    """Give the `model` of a form; None where it has none.

    Raises:
        InvalidRequest: it is no form, or its `model` is no name.
    """
    span = _find(form, content_type)
    if span is None:
        return None
    try:
        model = form[span.start : span.end].decode()
    except UnicodeDecodeError as exc:
        raise InvalidRequest("The form's `model` is not UTF-8.") from exc
    if not model or len(model) > MAX_MODEL_BYTES or not model.isprintable():
        raise InvalidRequest("The form's `model` is no model's name.")
    return model


def with_model_in_form(form: bytes, content_type: str, model: str) -> bytes:
    """Give a form with another `model`."""
    span = _find(form, content_type)
    return form if span is None else form[: span.start] + model.encode() + form[span.end :]


def _find(form: bytes, content_type: str) -> _Span | None:
    match = _boundary.search(content_type)
    if match is None:
        raise InvalidRequest("The form's Content-Type names no boundary.")
    delimiter = b"--" + (match[1] or match[2]).encode()
    at = 0 if form.startswith(delimiter) else form.find(b"\r\n" + delimiter)
    if at < 0:
        raise InvalidRequest("The body is no form: its boundary does not come in it.")
    at = form.index(delimiter, at) + len(delimiter)
    while (head_end := form.find(b"\r\n\r\n", at)) >= 0:
        start = head_end + 4
        end = form.find(b"\r\n" + delimiter, head_end + 2)
        if end < 0:
            return None
        if _disposition.search(form, at, head_end):
            return _Span(start, max(start, end))
        at = end + 2 + len(delimiter)
    return None
