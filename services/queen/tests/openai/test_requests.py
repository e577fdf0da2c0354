"""What is read of a front door's request, and what of it is changed: pure, byte for byte."""

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_contracts.errors import BodyTooLarge, InvalidRequest
from rbee_contracts.operations import OpenAI
from rbee_queen.config import parse
from rbee_queen.openai.aliases import Alias, Aliases, BadAlias
from rbee_queen.openai.answer import Answer
from rbee_queen.openai.endpoints import AUDIO, Dialect
from rbee_queen.openai.errors import UnsupportedMediaType
from rbee_queen.openai.forms import model_in_form, with_model_in_form
from rbee_queen.openai.request import operation_of

CHAT = "/v1/chat/completions"
FORM_TYPE = 'multipart/form-data; charset=utf-8; boundary="--b x"'


def form(*parts: tuple[str, bytes], boundary: str = "--b x") -> bytes:
    found = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
        for name, value in parts
    )
    return found + f"--{boundary}--\r\n".encode()


SPEECH = form(("file", b"RIFF\r\n--other\r\n\x00\xff"), ("model", b"whisper"), ("language", b"en"))

json_objects = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner, max_size=3),
    ),
    max_size=5,
)


@settings(deadline=None)
@given(value=json_objects, indent=st.sampled_from([None, 2]))
def test_any_object_is_taken_as_it_stands(value: dict[str, Any], indent: int | None) -> None:
    value.pop("model", None)
    body = json.dumps(value, indent=indent).encode()

    assert bytes(operation_of(CHAT, "application/json", body, 10**6).body) == body


@settings(deadline=None)
@given(value=json_objects)
def test_an_alias_changes_no_other_value(value: dict[str, Any]) -> None:
    op = operation_of(CHAT, "application/json", json.dumps(value | {"model": "a"}).encode(), 10**6)
    changed = Aliases([Alias("a", "org/m")]).resolve(op)

    assert changed.model == "org/m"
    assert json.loads(bytes(changed.body)) == value | {"model": "org/m"}


def test_what_is_no_alias_is_left_alone() -> None:
    op = OpenAI(endpoint=CHAT, body=msgspec.Raw(b'{"model":"m"}'))

    assert Aliases([Alias("a", "b")]).resolve(op) is op
    assert Aliases().resolve(OpenAI(endpoint=CHAT, body=msgspec.Raw(b"{}"))).model is None


def test_a_job_that_names_its_model_beside_the_body_gets_none_into_it() -> None:
    op = OpenAI(endpoint=CHAT, body=msgspec.Raw(b"{}"), model="a")

    assert bytes(Aliases([Alias("a", "m")]).resolve(op).body) == b"{}"


# --- aliases on the command line -----------------------------------------------------------------------


def test_aliases_come_from_the_command_line() -> None:
    options = ["--alias", "gpt-4o=org/m@main", "--alias", "my model=m", "--adapter", "loud=m"]
    config = parse(options, {})

    assert list(config.aliases) == [
        Alias("gpt-4o", "org/m@main"),
        Alias("my model", "m"),
        Alias("loud", "m", is_adapter=True),
    ]


def test_an_adapters_name_stays_in_the_body() -> None:
    op = OpenAI(endpoint=CHAT, body=msgspec.Raw(b'{"model": "loud"}'))
    found = Aliases.parse([], ["loud=m"]).resolve(op)

    assert (found.model, bytes(found.body)) == ("m", b'{"model": "loud"}')


def test_a_name_is_not_both_an_alias_and_an_adapter() -> None:
    with pytest.raises(BadAlias, match="two models"):
        Aliases.parse(["a=m"], ["a=m"])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["x"], "not of the form"),
        (["=m"], "not of the form"),
        (["x\n=m"], "not of the form"),
        (["x=../m"], "cannot name a model"),
        (["x=m", "x=n"], "stands for two models"),
        (["x=y", "y=m"], "is an alias itself"),
    ],
)
def test_an_alias_that_cannot_be_is_refused(
    options: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadAlias, match=why):
        Aliases.parse(options)
    with pytest.raises(SystemExit) as exited:
        parse([word for option in options for word in ("--alias", option)], {})

    assert exited.value.code == 2
    assert why in capsys.readouterr().err


# --- forms ---------------------------------------------------------------------------------------------


def test_a_forms_model_is_found_and_the_form_goes_on_whole() -> None:
    op = operation_of(AUDIO, FORM_TYPE, SPEECH, 10**6)

    assert (op.model, bytes(op.body), op.content_type) == ("whisper", b'{"model":"whisper"}', FORM_TYPE)
    assert base64.b64decode(op.body_base64 or "") == SPEECH


def test_an_alias_in_a_form_changes_its_field_only() -> None:
    op = Aliases([Alias("whisper", "org/w-large")]).resolve(operation_of(AUDIO, FORM_TYPE, SPEECH, 10**6))

    assert op.model == "org/w-large"
    assert base64.b64decode(op.body_base64 or "") == SPEECH.replace(b"whisper", b"org/w-large")


def test_a_form_without_a_model_names_none() -> None:
    without = form(("file", b"x"))

    assert operation_of(AUDIO, FORM_TYPE, without, 10**6).model is None
    assert with_model_in_form(without, FORM_TYPE, "m") == without
    assert model_in_form(without[:-20], FORM_TYPE) is None


def test_an_empty_field_is_no_name() -> None:
    with pytest.raises(InvalidRequest, match="no model's name"):
        model_in_form(form(("model", b"")), FORM_TYPE)


@pytest.mark.parametrize(
    ("content_type", "body", "error"),
    [
        ("multipart/form-data", SPEECH, InvalidRequest),
        ("multipart/form-data; boundary=zzz", SPEECH, InvalidRequest),
        (FORM_TYPE, form(("model", b"\xff")), InvalidRequest),
        (FORM_TYPE, form(("model", b"a\x00b")), InvalidRequest),
        (FORM_TYPE + "; x=" + "y" * 300, SPEECH, InvalidRequest),
        (FORM_TYPE + "; x=ü", SPEECH, InvalidRequest),
        (FORM_TYPE, SPEECH + b"x" * 1000, BodyTooLarge),
        ("application/json", b"{}", UnsupportedMediaType),
    ],
    ids=["no boundary", "other boundary", "not utf-8", "control", "long", "not ascii", "large", "json"],
)
def test_what_is_no_form_is_refused(content_type: str, body: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        operation_of(AUDIO, content_type, body, 1000)


@settings(deadline=None)
@given(
    noise=st.binary(max_size=40),
    model=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20),
)
def test_a_model_is_found_behind_any_file(noise: bytes, model: str) -> None:
    noise = noise.replace(b"----b x", b"")
    body = form(("file", noise), ("model", model.encode()))

    assert model_in_form(body, FORM_TYPE) == model


# --- answers -------------------------------------------------------------------------------------------


def test_a_chunk_without_data_is_decoded_rather_than_cut() -> None:
    answer = Answer(Dialect.OPENAI, "corr")
    common = b'"actor":"worker/w","job_id":"job-00000000-0000-0000-0000-000000000000","correlation_id":"c"'
    rest = common + b',"timestamp":"t","formatted":""'
    answer.feed(
        b'id: 1-0\ndata: {"action":"openai_response","message":"",%b,'
        b'"data":{"status":200,"content_type":"text/event-stream","stream":true}}\n\n' % rest
    )
    frames = answer.feed(
        b'id: 1-1\ndata: {"action":"chunk","message":"",%b,"timestamp":"t","index":0}\n\n' % common
    )

    assert frames == b"data: null\n\n"
