"""Text from elsewhere made safe to show: what a model, a file name or another user's process may contain."""

_STEERING = [code for code in [*range(0x20), 0x7F, *range(0x80, 0xA0)] if chr(code) not in "\n\t"]
_WITHOUT_STEERING = dict.fromkeys(_STEERING)

_BREAKS = [0x09, 0x0A, 0x2028, 0x2029]
_REORDERING = [0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ON_ONE_LINE = _WITHOUT_STEERING | dict.fromkeys(_REORDERING) | dict.fromkeys(_BREAKS, " ")

_AS_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}


def printable(text: str) -> str:
    """Give `text` without the control characters that could steer a terminal."""
    return text.translate(_WITHOUT_STEERING)


def one_line(text: str) -> str:
    """Give `text` as one line that reads in one direction, so that it cannot pose as several."""
    return text.translate(_ON_ONE_LINE)


def printable_json(document: str) -> str:
    """Give the same JSON with the control characters that JSON allows in text as escapes."""
    return document.translate(_AS_JSON_ESCAPES)
