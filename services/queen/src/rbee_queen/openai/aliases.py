"""Names for models: what a request may say instead of the name that a worker serves."""

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from rbee_contracts.ids import MODEL_ID_PATTERN
from rbee_contracts.operations import OpenAI
from rbee_queen.openai.forms import with_model_in_form

MAX_ALIAS_CHARS = 290

_is_model = re.compile(MODEL_ID_PATTERN).match
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


class BadAlias(ValueError):
    """A name that cannot be; the message is one line."""


class Alias(NamedTuple):
    """A name for a model. The engine knows an adapter by its own name, and an alias not at all."""

    name: str
    model: str
    is_adapter: bool = False


class Aliases:
    """The names for models that one queen knows."""

    def __init__(self, aliases: Iterable[Alias] = ()) -> None:
        self._aliases = {alias.name: alias for alias in aliases}

    @classmethod
    def parse(cls, aliases: Sequence[str], adapters: Sequence[str] = ()) -> "Aliases":
        """Read `NAME=MODEL` options.

        Raises:
            BadAlias: one is none, stands for two models, or for another alias.
        """
        found: dict[str, Alias] = {}
        options = [("--alias", text) for text in aliases] + [("--adapter", text) for text in adapters]
        for option, text in options:
            name, equals, model = text.partition("=")
            if not equals or not name.strip() or len(name) > MAX_ALIAS_CHARS or not name.isprintable():
                raise BadAlias(f"{option} {text[:100]!r} is not of the form NAME=MODEL")
            if _is_model(model) is None:
                raise BadAlias(f"{option} {text[:100]!r}: {model[:100]!r} cannot name a model")
            alias = Alias(name, model, is_adapter=option == "--adapter")
            if found.setdefault(name, alias) != alias:
                raise BadAlias(f"{option} {name!r} stands for two models: {found[name].model} and {model}")
        for alias in found.values():
            if alias.model in found:
                raise BadAlias(f"{alias.name!r} stands for {alias.model!r}, which is an alias itself")
        return cls(found.values())

    def __iter__(self) -> Iterator[Alias]:
        return iter(self._aliases.values())

    def resolve(self, op: OpenAI) -> OpenAI:
        """Give a request with the model that its alias stands for; any other request as it is.

        Nothing of the body changes but the value of `model`, and for an adapter not even that.
        """
        alias = self._aliases.get(op.model) if op.model is not None else None
        if alias is None:
            return op
        model = alias.model
        if alias.is_adapter:
            return msgspec.structs.replace(op, model=model)
        changes: dict[str, object] = {"model": model, "body": _with_model(op.body, model)}
        if op.body_base64 is not None:
            form = with_model_in_form(base64.b64decode(op.body_base64), op.content_type, model)
            changes["body_base64"] = base64.b64encode(form).decode()
        return msgspec.structs.replace(op, **changes)


def _with_model(body: msgspec.Raw, model: str) -> msgspec.Raw:
    fields = _fields(body)
    if "model" in fields:
        fields["model"] = msgspec.Raw(_encode(model))
    return msgspec.Raw(_encode(fields))
