"""A body becomes an operation or an `InvalidRequest`, whatever is in it."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_contracts import operations as ops
from rbee_contracts.errors import InvalidRequest
from rbee_contracts.operations import (
    OPERATIONS,
    Infer,
    Operation,
    WorkerSpawn,
    decode_operation,
    encode_operation,
    unknown_fields,
)

EXAMPLES: list[Operation] = [
    Infer(model="m", prompt="Hello"),
    Infer(model="org/m@main", prompt=[1, 2, 3], timeout_s=1.5, resume_window_s=0, hive_id="h", worker_id="w"),
    Infer(
        model="m",
        messages=[{"role": "user", "content": [{"type": "text", "text": "\u2028\x00é\U0001f41d"}]}],
        max_tokens=50,
        min_tokens=1,
        n=2,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        seed=-(2**63),
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.1,
        stop=["a", "b"],
        stop_token_ids=[1],
        include_stop_str_in_output=True,
        ignore_eos=True,
        bad_words=["x"],
        allowed_token_ids=[5],
        logit_bias={"17": -100.0},
        logprobs=5,
        skip_special_tokens=False,
        logprob_token_ids=[3],
        stream_interval=4,
        skip_reading_prefix_cache=True,
        watermarking=False,
        spaces_between_special_tokens=False,
        thinking_token_budget=10,
        structured_outputs={"json": {"type": "object"}},
        repetition_detection={"a": 1},
        extra_args={"b": [None, True, 1.5]},
        chat_template_kwargs={"c": "d"},
        priority=-1,
    ),
    ops.OpenAI(
        endpoint="/v1/chat/completions",
        body=msgspec.Raw(b'{"model":"m","messages":[]}'),
        hive_id="h",
        worker_id="w",
    ),
    ops.Status(),
    ops.HiveList(timeout_s=3.0),
    ops.HiveGet(hive_id="h"),
    ops.ScheduleExplain(model="m", hive_id="h", worker_id="w"),
    ops.QueenCheck(),
    WorkerSpawn(model="m"),
    WorkerSpawn(model="m", worker="cuda", devices=[0, 1], worker_args=["--seed", "1"], hive_id="h"),
    WorkerSpawn(model="m", worker="cpu", device=0),
    ops.WorkerList(hive_id="h"),
    ops.WorkerGet(worker_id="w"),
    ops.WorkerStop(worker_id="w", grace_s=0.0),
    ops.WorkerDrain(worker_id="w", draining=False),
    ops.WorkerLog(worker_id="w", lines=0, follow=True),
    ops.LogSearch(correlation_id="corr-1", since_s=60.0, level="warning"),
    ops.WorkerProcessList(),
    ops.WorkerProcessGet(pid=4_000_000),
    ops.WorkerProcessDelete(pid=2),
    ops.ModelDownload(model="org/m", revision="main", allow_patterns=["*.json"], source="hub"),
    ops.ModelGet(model="m"),
    ops.ModelDelete(model="m"),
    ops.ModelLoad(model="m"),
    ops.ModelUnload(model="m"),
    ops.ModelList(),
    ops.DeviceList(),
    ops.HiveForget(hive_id="box1"),
    ops.HiveDrain(draining=False),
    ops.HiveCheck(),
]

INFER = b'{"operation":"infer","model":"m","prompt":"Hi"%b}'


def refusal(body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        decode_operation(body)
    return caught.value


def test_there_is_an_example_of_every_operation() -> None:
    assert {type(operation) for operation in EXAMPLES} == set(OPERATIONS.values())


def test_the_operations_are_those_of_the_reference() -> None:
    assert set(OPERATIONS) == {
        *("status", "infer", "openai", "hive_list", "hive_get", "schedule_explain", "queen_check"),
        *("worker_spawn", "worker_list", "worker_get", "worker_stop", "worker_process_list", "log_search"),
        *("worker_process_get", "worker_process_delete", "model_download", "model_get", "model_delete"),
        *("model_load", "model_unload", "model_list", "device_list", "hive_check"),
        *("worker_drain", "worker_log", "hive_drain", "hive_forget"),
    }


@pytest.mark.parametrize("operation", EXAMPLES, ids=lambda operation: operation.name)
def test_every_operation_round_trips(operation: Operation) -> None:
    body = encode_operation(operation)

    assert decode_operation(body) == operation
    assert json.loads(body)["operation"] == operation.name
    assert unknown_fields(body, operation) == {}


def test_the_example_of_the_design_is_taken() -> None:
    body = b'{"operation":"infer","model":"rbee-tiny","prompt":"Hello","max_tokens":50}'

    assert decode_operation(body) == Infer(model="rbee-tiny", prompt="Hello", max_tokens=50)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" ", b"{", b"{]", b"nul", b"{'operation': 'status'}", b'{"operation":"status"} x', b"NaN"),
        b'\xef\xbb\xbf{"operation":"status"}',
        '{"operation":"status"}'.encode("utf-16"),
        '{"operation":"status"}'.encode("utf-32"),
        b'{"operation":"infer","model":"m","prompt":"\xff\xfe"}',
        b'{"operation":"infer","model":"m","prompt":"\xed\xa0\x80"}',
        b'{"operation":"\xff"}',
        b'{"operation":"infer","model":"m","prompt":"\\ud800"}',
        b'{"operation":"infer","model":"m","prompt":"line\nbreak"}',
        INFER % (b',"unknown":' + b"[" * 100_000 + b"]" * 100_000),
        INFER % (b',"unknown":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        INFER % b',"temperature":NaN',
        INFER % b',"temperature":Infinity',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_is_not_json_is_invalid_json(body: bytes) -> None:
    assert refusal(body).code == "invalid_json"


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"operation":' * 100_000,
        INFER % (b',"messages":' + b"[" * 100_000),
        INFER % (b',"extra_args":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        INFER % (b',"unknown":' + b"[" * 100_000),
    ],
    ids=lambda body: repr(body[:40]),
)
def test_deep_nesting_is_refused(body: bytes) -> None:
    assert refusal(body).code.startswith("invalid_")


@pytest.mark.parametrize("text", ["null", "1", "[]", '"infer"', "{}", '{"model":"m"}', '{"operation":null}'])
def test_a_body_without_an_operation_is_refused(text: str) -> None:
    assert refusal(text.encode()).code == "invalid_operation"


@pytest.mark.parametrize(
    "value", ["1", "true", "[]", "{}", '""', '"Infer"', '"infer\\u0000"', '"invalid_op"']
)
def test_an_unknown_operation_is_refused(value: str) -> None:
    error = refusal(b'{"operation":%b}' % value.encode())

    assert (error.code, error.error) == ("invalid_operation", "Invalid operation")


def test_an_unknown_operation_is_named() -> None:
    assert refusal(b'{"operation":"invalid_op"}').details.startswith("Unknown operation: invalid_op")


def test_an_operation_nearly_known_is_hinted_at() -> None:
    assert "Did you mean worker_spawn?" in refusal(b'{"operation":"worker_spwan","model":"m"}').details


def test_a_missing_operation_is_told_as_such() -> None:
    assert refusal(b'{"model":"m"}').details.startswith("Missing field: operation")


@pytest.mark.parametrize(
    "fields",
    [
        *('"max_tokens":"50"', '"max_tokens":50.5', '"max_tokens":true', '"max_tokens":0', '"max_tokens":-1'),
        *('"max_tokens":10000001', '"n":129', '"temperature":-0.1', '"temperature":"1"', '"top_p":0'),
        *('"top_p":1.1', '"seed":9223372036854775808', '"priority":2147483648', '"timeout_s":0'),
        *('"timeout_s":604801', '"resume_window_s":-1', '"resume_window_s":3601', '"stop":[""]', '"stop":1'),
        *('"stop":["a",1]', '"logit_bias":{"a":1}', '"logit_bias":{"1":101}', '"logit_bias":[]'),
        *('"messages":[]', '"messages":[{"role":"user"}]', '"allowed_token_ids":[]', '"ignore_eos":1'),
        *(
            '"hive_id":"../x"',
            '"hive_id":""',
            '"worker_id":"a\\u0000"',
            '"worker_id":"a\\n"',
            '"model":"/etc"',
        ),
        *(
            '"model":"a\\u0000b"',
            '"model":null',
            '"prompt":null',
            '"prompt":1',
            '"prompt":[]',
            '"prompt":[-1]',
        ),
        *(
            '"prompt":[2147483648]',
            '"prompt":[1,"a"]',
            '"extra_args":[]',
            '"extra_args":{"a":%s}' % ("9" * 5000),
        ),
        *(f'"max_tokens":{"9" * 400}', f'"max_tokens":{"9" * 5000}', '"temperature":1e400'),
    ],
)
def test_a_field_that_does_not_fit_is_refused_and_named(fields: str) -> None:
    error = refusal(INFER % f",{fields}".encode())

    assert error.code == "invalid_field"
    assert len(error.details) < 500


@pytest.mark.parametrize(
    "body",
    [
        b'{"operation":"infer","model":"m"}',
        b'{"operation":"infer","prompt":"Hi"}',
        b'{"operation":"worker_spawn","model":"m","device":0,"devices":[0]}',
        b'{"operation":"worker_spawn","model":"m","devices":[0,0]}',
        b'{"operation":"worker_spawn","model":"m","worker":"tpu"}',
        b'{"operation":"worker_spawn","model":"m","worker_args":["a\\u0000"]}',
        b'{"operation":"worker_process_delete","pid":1}',
        b'{"operation":"worker_process_delete","pid":-1}',
        b'{"operation":"worker_process_delete","pid":0}',
        b'{"operation":"model_download","model":"m","revision":"../main"}',
        b'{"operation":"openai","endpoint":"/metrics","body":{}}',
        b'{"operation":"openai","endpoint":"/v1/../metrics","body":{}}',
        b'{"operation":"openai","endpoint":"/v1/completions\\n","body":{}}',
        b'{"operation":"openai","endpoint":"/v1/completions","body":[]}',
        b'{"operation":"hive_get"}',
    ],
)
def test_an_operation_that_makes_no_sense_is_refused(body: bytes) -> None:
    assert refusal(body).code in ("invalid_field", "invalid_json")


def test_a_pattern_is_told_in_words() -> None:
    details = refusal(b'{"operation":"infer","model":"../x","prompt":"Hi"}').details

    assert "a model id" in details
    assert "regex" not in details


def test_duplicate_keys_take_the_last() -> None:
    operation = decode_operation(INFER % b',"max_tokens":1,"max_tokens":2,"prompt":"Ho"')

    assert operation == Infer(model="m", prompt="Ho", max_tokens=2)


def test_two_operations_in_one_body_are_refused() -> None:
    body = b'{"operation":"status","operation":"infer","model":"m","prompt":"Hi"}'

    assert refusal(body).code == "invalid_field"


def test_unknown_fields_are_ignored_and_reported() -> None:
    body = INFER % b',"max_token":5,"zzz":{"deep":[1]},"max_tokens":7'
    operation = decode_operation(body)

    assert operation == Infer(model="m", prompt="Hi", max_tokens=7)
    assert unknown_fields(body, operation) == {"max_token": "max_tokens", "zzz": None}


def test_an_unknown_field_whose_name_is_not_utf8_is_refused() -> None:
    body = b'{"operation":"status","\xff":1}'

    with pytest.raises(InvalidRequest):
        unknown_fields(body, decode_operation(body))


def test_an_error_quotes_no_flood() -> None:
    error = refusal(b'{"operation":"worker_spawn","model":"m","worker":"%b"}' % (b"x" * 1_000_000))

    assert error.code == "invalid_field"
    assert len(error.details) < 600


def test_a_flood_of_unknown_fields_is_reported_in_part() -> None:
    names = [f"field_{index}" for index in range(50_000)]
    body = msgspec.json.encode({"operation": "status"} | dict.fromkeys(names, 1) | {"x" * 1_000_000: 1})

    found = unknown_fields(body, decode_operation(body))

    assert 1 <= len(found) <= 100


# --- fuzz ----------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["m", "", "../x", "\x00", "a" * 5000, 10**400, -1, 0, 2**63, 2**64]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
field_names = sorted({name for kind in OPERATIONS.values() for name in kind.__struct_fields__})
bodies_of_fields = st.builds(
    lambda name, fields: json.dumps({"operation": name} | fields).encode(),
    st.sampled_from(sorted(OPERATIONS)) | json_values,
    st.dictionaries(st.sampled_from(field_names) | st.text(max_size=12), json_values, max_size=6),
)


@st.composite
def damaged_bodies(draw: st.DrawFn) -> bytes:
    body = encode_operation(draw(st.sampled_from(EXAMPLES)))
    start = draw(st.integers(0, len(body)))
    end = draw(st.integers(start, min(len(body), start + 8)))
    return body[:start] + draw(st.binary(max_size=8)) + body[end:]


@settings(deadline=None, max_examples=400)
@given(body=st.binary(max_size=200) | bodies_of_fields | damaged_bodies())
def test_any_body_gives_an_operation_or_an_invalid_request(body: bytes) -> None:
    refused: InvalidRequest | None = None
    try:
        operation = decode_operation(body)
        unknown_fields(body, operation)
    except InvalidRequest as error:
        refused = error
    if refused is not None:
        assert refused.code in ("invalid_json", "invalid_operation", "invalid_field")
        assert len(refused.details) < 1000
        msgspec.json.encode(refused.body())
        return

    assert type(operation) in OPERATIONS.values()
    assert decode_operation(encode_operation(operation)) == operation


@settings(deadline=None)
@given(value=json_values)
def test_free_form_fields_go_through_unchanged(value: Any) -> None:
    try:
        body = msgspec.json.encode({"operation": "openai", "endpoint": "/v1/x", "body": {"v": value}})
    except (OverflowError, UnicodeError):
        return
    operation = decode_operation(body)

    assert isinstance(operation, ops.OpenAI)
    assert json.loads(encode_operation(operation))["body"] == json.loads(body)["body"]
