"""The pure rules of models: names, which files make one, facts from their headers, rates, sizes."""

import json
import struct
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_contracts.errors import InvalidRequest, NoCapacity
from rbee_contracts.nodes import WorkerInfo, WorkerState
from rbee_hive.models import UnusableHub, read_hub_access, users_by_model
from rbee_hive.models.choose import choose
from rbee_hive.models.facts import Facts, config_facts, gguf_facts
from rbee_hive.models.fetch import delays, retry_after_s
from rbee_hive.models.ledger import Ledger
from rbee_hive.models.names import MAX_FILES, check_path, check_paths, is_hidden, parse_model
from rbee_hive.models.progress import RATE_WINDOW_S, Meter, eta_s
from rbee_hive.models.source import Patience
from rbee_hive.models.space import Space, readable

# --- names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "revision", "expected"),
    [
        ("tiny", None, "tiny"),
        ("org/name", None, "org/name"),
        ("org/name@v1", None, "org/name@v1"),
        ("org/name", "v1", "org/name@v1"),
        ("org/name@v1", "v1", "org/name@v1"),
    ],
)
def test_a_revision_is_part_of_the_id(model: str, revision: str | None, expected: str) -> None:
    assert parse_model(model, revision).id == expected


@settings(deadline=None)
@given(st.text(max_size=40))
def test_no_text_at_all_becomes_a_path_outside(text: str) -> None:
    try:
        check_path(text, "the hub")
    except InvalidRequest:
        pass
    else:
        path = Path("/srv/models") / text
        assert Path("/srv/models") in path.parents
        assert ".." not in path.parts


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "a/b", "a/b/c", "b", "b/a", "c"]), max_size=6))
def test_what_is_accepted_together_can_lie_in_one_folder(paths: list[str]) -> None:
    try:
        check_paths(paths, "the hub")
    except InvalidRequest:
        folders = {
            "/".join(path.split("/")[:depth]) for path in paths for depth in range(1, path.count("/") + 1)
        }
        assert len(set(paths)) < len(paths) or folders & set(paths)


def test_too_many_files_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="more than"):
        check_paths((f"f{number}" for number in range(MAX_FILES + 1)), "the hub")


@pytest.mark.parametrize(
    ("path", "expected"), [("a/b", False), (".a", True), ("a/.b/c", True), ("a.b", False)]
)
def test_hidden_files_are_told_by_any_of_their_folders(path: str, expected: bool) -> None:
    assert is_hidden(path) == expected


# --- which files ---------------------------------------------------------------------------------------

LLAMA = [
    "config.json",
    "tokenizer.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
]


@pytest.mark.parametrize(
    ("others", "patterns", "expected"),
    [
        ([], None, LLAMA),
        (["pytorch_model.bin", "model.h5", "onnx/model.onnx", "original/consolidated.pth"], None, LLAMA),
        (["consolidated.safetensors", ".gitattributes", "flax_model.msgpack"], None, LLAMA),
        (["README.md"], None, [*LLAMA, "README.md"]),
        (["pytorch_model.bin"], ["*.json", "*.bin"], ["config.json", "tokenizer.json", "pytorch_model.bin"]),
        (["onnx/a.onnx"], ["config.json", "onnx/"], ["config.json", "onnx/a.onnx"]),
        ([".secret"], ["*"], LLAMA),
    ],
)
def test_each_weight_is_fetched_once_and_other_formats_when_asked_for(
    others: list[str], patterns: list[str] | None, expected: list[str]
) -> None:
    assert choose([*LLAMA, *others], patterns) == expected


def test_weights_without_safetensors_are_fetched_as_they_are() -> None:
    assert choose(["config.json", "pytorch_model.bin"], None) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("paths", "patterns", "code"),
    [
        (["README.md"], None, "not_a_model"),
        ([], None, "not_a_model"),
        (["a-Q4.gguf", "a-Q8.gguf"], None, "choose_a_file"),
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], None, "not_a_model"),
        (LLAMA, ["*.none"], "no_file_matches"),
        (LLAMA, ["*.safetensors"], "not_a_model"),
        (["a-Q4.gguf", "a-Q8.gguf"], ["*.gguf"], "not_a_model"),
    ],
)
def test_what_makes_no_model_is_refused(paths: list[str], patterns: list[str] | None, code: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        choose(paths, patterns)

    assert error.value.code == code


def test_one_gguf_file_of_several_can_be_chosen() -> None:
    assert choose(["a-Q4.gguf", "a-Q8.gguf", "README.md"], ["*Q4*"]) == ["a-Q4.gguf"]
    assert choose(["a.gguf", "README.md"], None) == ["a.gguf", "README.md"]


# --- facts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Facts()),
        (
            {"architectures": ["A"], "torch_dtype": "bfloat16", "max_position_embeddings": 10},
            Facts(architecture="A", dtype="bfloat16", max_model_len=10),
        ),
        (
            {"architectures": ["V"], "text_config": {"dtype": "float16", "max_position_embeddings": 20}},
            Facts(architecture="V", dtype="float16", max_model_len=20),
        ),
        ({"n_positions": 30}, Facts(max_model_len=30)),
        ({"max_position_embeddings": True, "architectures": "A", "dtype": 5}, Facts()),
        ({"max_position_embeddings": -1, "architectures": []}, Facts()),
        ([], Facts()),
    ],
)
def test_facts_of_a_config(tmp_path: Path, config: object, expected: Facts) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))

    assert config_facts(path) == expected


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(*pairs: tuple[str, int, bytes]) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs))
    return header + b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)


GGUF = gguf(
    ("general.architecture", 8, text("llama")),
    ("general.file_type", 4, struct.pack("<I", 15)),
    ("general.tags", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
    ("llama.numbers", 9, struct.pack("<IQ", 4, 2) + bytes(8)),
    ("llama.context_length", 4, struct.pack("<I", 8192)),
    ("tokenizer.ggml.model", 8, text("gpt2")),
    ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2**60)),
)


def test_facts_of_a_gguf_header(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUF)

    assert gguf_facts(path) == Facts(architecture="llama", dtype="Q4_K_M", max_model_len=8192)


@settings(deadline=None)
@given(st.integers(0, len(GGUF) - 1), st.binary(max_size=20))
def test_a_gguf_header_of_any_bytes_is_read_without_a_crash(
    tmp_path_factory: pytest.TempPathFactory, cut: int, rest: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(GGUF[:cut] + rest)

    gguf_facts(path)


# --- rates and sizes -----------------------------------------------------------------------------------


def test_the_rate_is_of_the_last_seconds() -> None:
    meter = Meter()
    for second in range(20):
        meter.sample(second, second * 100 if second < 10 else 1000 + (second - 10) * 1000)

    assert meter.rate() == 1000
    meter.sample(20 + RATE_WINDOW_S, 10_000)
    meter.sample(20 + 2 * RATE_WINDOW_S, 10_000)
    assert meter.rate() == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10**12)), max_size=30))
def test_a_rate_is_never_negative(steps: list[tuple[float, int]]) -> None:
    meter, now, received = Meter(), 0.0, 0
    for wait, size in steps:
        now, received = now + wait, received + size
        meter.sample(now, received)

    assert meter.rate() >= 0


@pytest.mark.parametrize(
    ("left", "rate", "expected"), [(100, 10.0, 10.0), (0, 0.0, 0.0), (5, 0.0, None), (None, 5.0, None)]
)
def test_the_time_to_go(left: int | None, rate: float, expected: float | None) -> None:
    assert eta_s(left, rate) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_600, "100 kB"), (1.5e9, "1.5 GB"), (3e18, "3000 PB")],
)
def test_sizes_are_said_in_powers_of_ten(size: float, expected: str) -> None:
    assert readable(size) == expected


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["reserve", "written", "release"]), st.integers(0, 600)), max_size=40)
)
def test_no_more_is_promised_than_is_free(steps: list[tuple[str, int]]) -> None:
    space = Space(Path("/"))
    space.measure = lambda: (0, 1000)  # type: ignore[method-assign]
    kept = []
    for step, size in steps:
        if step == "reserve":
            try:
                kept.append(space.reserve(size, "m", lambda: "Delete something."))
            except NoCapacity:
                assert space.reserved + size > 1000
        elif kept and step == "written":
            kept[-1].written(size)
        elif kept:
            kept.pop().release()
        assert 0 <= space.reserved <= 1000
        assert space.reserved == sum(reservation.left for reservation in kept)


# --- waiting -------------------------------------------------------------------------------------------


def test_waits_double_up_to_a_bound() -> None:
    waits = delays(Patience(backoff_first_s=1, backoff_max_s=4))

    for bound in (1, 2, 4, 4, 4):
        assert 0.75 * bound <= next(waits) <= bound


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7", 7.0),
        ("Sun, 22 Nov 2026 10:00:30 GMT", 30.0),
        ("Sun, 22 Nov 2026 09:00:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        ("Fri, 31 Dec 99999999999999999999 00:00:00 GMT", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, expected: float | None) -> None:
    assert retry_after_s(value, datetime(2026, 11, 22, 10, 0, tzinfo=UTC)) == expected


# --- settings ------------------------------------------------------------------------------------------


def test_the_hub_is_set_by_the_environment_and_the_configuration_wins(tmp_path: Path) -> None:
    environ = {"HF_ENDPOINT": "http://mirror:8080/", "HF_TOKEN": "hf_env", "HF_HUB_DOWNLOAD_TIMEOUT": "7"}
    (tmp_path / "token").write_text("hf_file\n")

    by_environ = read_hub_access(environ)
    by_config = read_hub_access(environ, endpoint="https://other", token_file=tmp_path / "token")

    assert (by_environ.endpoint, by_environ.token) == ("http://mirror:8080", "hf_env")
    assert by_environ.patience.read_s == 7
    assert (by_config.endpoint, by_config.token) == ("https://other", "hf_file")
    assert read_hub_access({}).token is None
    assert "hf_" not in repr(by_environ)


@pytest.mark.parametrize(
    "environ",
    [
        {"HF_ENDPOINT": "mirror"},
        {"HF_ENDPOINT": "ftp://mirror"},
        {"HF_ENDPOINT": "http://user:secret@mirror"},
        {"HF_TOKEN": "two words"},
        {"HF_TOKEN": "a\nb"},
        {"HF_HUB_DOWNLOAD_TIMEOUT": "soon"},
        {"HF_HUB_ETAG_TIMEOUT": "-1"},
    ],
)
def test_a_hub_that_cannot_be_used_is_one_line_without_its_secret(environ: dict[str, str]) -> None:
    with pytest.raises(UnusableHub) as error:
        read_hub_access(environ)

    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnusableHub, match="none"):
        read_hub_access({}, token_file=tmp_path / "none")


# --- what is remembered --------------------------------------------------------------------------------


def test_the_ledger_remembers_sums_until_a_file_changes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "state")
    path = tmp_path / "models/m/config.json"
    ledger.learn(path, 5, 100, "abc")
    ledger.use("m", "2026-11-22T10:00:00+00:00")

    again = Ledger(tmp_path / "state")
    assert again.sum_of(path, 5, 100) == "abc"
    assert again.sum_of(path, 5, 101) is None
    assert again.sum_of(path, 6, 100) is None
    assert again.last_used("m") == "2026-11-22T10:00:00+00:00"
    again.forget("m", tmp_path / "models/m")
    assert Ledger(tmp_path / "state").sum_of(path, 5, 100) is None


def test_a_ledger_that_cannot_be_read_or_written_is_only_forgotten(tmp_path: Path) -> None:
    (tmp_path / "models.json").write_bytes(b"\xff")
    ledger = Ledger(tmp_path)
    assert ledger.last_used("m") is None
    blocked = Ledger(tmp_path / "models.json")
    blocked.use("m", "now")
    assert blocked.last_used("m") == "now"


@pytest.mark.parametrize(
    ("state", "is_used"),
    [
        *(("starting", True), ("ready", True), ("sleeping", True), ("draining", True), ("stopping", True)),
        *(("stopped", False), ("failed", False)),
    ],
)
def test_a_model_is_used_by_every_worker_that_lives(state: WorkerState, is_used: bool) -> None:
    worker = WorkerInfo(
        worker_id="w1",
        model="m",
        state=state,
        pid=1,
        port=1,
        running=0,
        waiting=0,
        kv_cache_usage=0.0,
        worker="cpu",
        devices=[0],
        started_at="",
    )

    assert users_by_model([worker]) == ({"m": ["w1"]} if is_used else {})
