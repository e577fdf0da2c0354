"""What of an operation is erased when its job ends: the text of the request."""

import msgspec

BLANKS = {"prompt": b'""', "messages": b"[{}]", "body": b"{}"}
"""The fields that hold it, each with what stands there instead, so that the operation still decodes."""

_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode
_blanks = {name: msgspec.Raw(blank) for name, blank in BLANKS.items()}


def split(operation: bytes) -> tuple[bytes, bytes | None]:
    """Give an operation's JSON without the text of the request, and that text as JSON where there is any."""
    fields = _decode(operation)
    payload = {name: fields[name] for name in _blanks if name in fields}
    if not payload:
        return operation, None
    return _encode(fields | {name: _blanks[name] for name in payload}), _encode(payload)


def join(operation: bytes, payload: bytes | None) -> bytes:
    """Put an operation's JSON together again."""
    if payload is None:
        return operation
    return _encode(_decode(operation) | _decode(payload))
