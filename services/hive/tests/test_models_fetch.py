"""Downloads from a hub that fails in every way a hub does, over real sockets."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from hub_server import Hub, Kind, running_hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rbee_downloads import IMPATIENT, Told, files_of, running_store, small_model
from rbee_inprocess import eventually

from rbee_contracts.errors import Forbidden, InvalidRequest, NotFound, RbeeError, Unavailable
from rbee_hive.models.downloads import PROGRESS_EVERY_S

MODEL = Path(__file__).resolve().parents[3] / "models/rbee-tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.add("org/tiny", MODEL)
        yield hub


async def test_a_download_brings_every_file_and_its_sums(tmp_path: Path, hub: Hub) -> None:
    told = Told()
    async with running_store(tmp_path, hub) as store:
        outcome = await store.fetch("org/tiny", told)
        info = await store.models.described("org/tiny")

    expected = hub.repos["org/tiny"].files
    assert files_of(tmp_path / "models/org/tiny") == expected
    assert {file.path: file.sha256 for file in info.file_list} == {
        path: hashlib.sha256(data).hexdigest() for path, data in expected.items()
    }
    assert (info.revision, info.architecture, info.dtype, info.max_model_len) == (
        hub.repos["org/tiny"].commit,
        "LlamaForCausalLM",
        "bfloat16",
        2048,
    )
    assert outcome.fetched_bytes == sum(map(len, expected.values()))
    assert told.actions()[0] == "model_download_start"
    last = told.progress()[-1]
    assert (last.bytes_done, last.files_done, last.files_total) == (last.bytes_total, 8, 8)
    assert store.staged() == []
    assert not (tmp_path / "models/.downloads").exists()


def test_progress_comes_at_most_four_times_a_second() -> None:
    assert 3 * PROGRESS_EVERY_S >= 1


async def test_what_lies_here_already_is_not_fetched_again(tmp_path: Path, hub: Hub) -> None:
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/tiny")
        asked = len(hub.bodies("/"))
        told = Told()
        outcome = await store.fetch("org/tiny", told)

    assert outcome.source is None
    assert "model_download_here" in told.actions()
    assert len(hub.bodies("/resolve/")) + len(hub.bodies("/blobs/")) < asked


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("reset", {"after": 900_000, "times": 2}),
        ("truncate", {"after": 300_000, "times": 3}),
        ("status", {"status": 500, "times": 2}),
        ("status", {"status": 503, "times": 2, "headers": {"Retry-After": "0"}}),
        ("status", {"status": 429, "times": 2, "headers": {"Retry-After": "0"}}),
        ("status", {"status": 403, "times": 1}),
    ],
    ids=["reset", "truncated", "500", "503", "429", "expired-address"],
)
async def test_a_file_goes_on_where_it_was_cut(
    tmp_path: Path, hub: Hub, kind: Kind, options: dict[str, Any]
) -> None:
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail(kind, path, **options)
    told = Told()
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/tiny", told)

    bodies = hub.bodies(path)
    assert files_of(tmp_path / "models/org/tiny") == hub.repos["org/tiny"].files
    assert sum(asked.sent for asked in bodies) < 2 * len(hub.repos["org/tiny"].files[WEIGHTS])
    if kind in ("reset", "truncate"):
        assert all("range" in asked.headers and "if-range" in asked.headers for asked in bodies[1:])
    assert "model_download_retry" in told.actions()


@pytest.mark.parametrize("path", ["/api/models/", "/resolve/"], ids=["list", "file"])
@pytest.mark.parametrize("status", [429, 500, 502, 504])
async def test_a_hub_that_recovers_is_asked_again(tmp_path: Path, hub: Hub, path: str, status: int) -> None:
    hub.fail("status", path, status=status, times=2)
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/tiny")

        assert store.listed() == ["org/tiny"]


async def test_a_hub_that_falls_silent_is_asked_again(tmp_path: Path, hub: Hub) -> None:
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail("hold", path, after=500_000)
    patience = msgspec.structs.replace(IMPATIENT, read_s=1.0, file_attempts=100, list_attempts=100)
    async with running_store(tmp_path, hub, patience=patience) as store, anyio.create_task_group() as tasks:
        tasks.start_soon(store.fetch, "org/tiny")
        await eventually(lambda: store.partial_size() >= 500_000, "what came before the silence is kept")
        hub.heal()

    assert files_of(tmp_path / "models/org/tiny") == hub.repos["org/tiny"].files
    ranges = [asked.headers.get("range", "bytes=0-") for asked in hub.bodies(path)]
    starts = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges]
    assert max(starts) >= 500_000


@pytest.mark.parametrize("path", ["/api/models/", "/resolve/", "/blobs/"], ids=["list", "file", "content"])
async def test_a_hub_that_fails_for_good_is_an_error_once(tmp_path: Path, hub: Hub, path: str) -> None:
    hub.fail("status", path, status=500)
    told = Told()
    async with running_store(tmp_path, hub) as store:
        with pytest.raises(Unavailable) as error:
            await store.fetch("org/tiny", told)

        assert error.value.code == "hub_unavailable"
        assert error.value.retryable
        assert store.listed() == []
        assert sum(path in asked.path and asked.status == 500 for asked in hub.asked) <= 4 * 3
        hub.heal()
        await store.fetch("org/tiny")
        assert store.listed() == ["org/tiny"]


async def test_a_hub_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store:
        with pytest.raises(Unavailable) as error:
            await store.fetch("org/tiny")

    assert error.value.code == "source_unavailable"


async def test_too_long_a_retry_after_is_an_error_that_names_it(tmp_path: Path, hub: Hub) -> None:
    hub.fail("status", "/api/", status=429, headers={"Retry-After": "3600"})
    async with running_store(tmp_path, hub) as store:
        with pytest.raises(Unavailable, match="3600 s") as error:
            await store.fetch("org/tiny")

    assert error.value.code == "hub_rate_limited"
    assert len(hub.asked) == 1


@pytest.mark.parametrize(
    ("repo", "token", "error_type", "code", "words"),
    [
        ({"token": "hf_right"}, None, NotFound, "model_not_found", "HF_TOKEN"),
        ({"token": "hf_right"}, "hf_wrong", NotFound, "model_not_found", "HF_TOKEN"),
        ({"token": "hf_right", "is_gated": True}, None, Forbidden, "hub_access_denied", "licence"),
        ({"token": "hf_right", "is_gated": True}, "hf_wrong", Forbidden, "hub_access_denied", "licence"),
        ({"revisions": ()}, None, NotFound, "revision_not_found", "'main'"),
    ],
    ids=["private", "wrong-token", "gated", "gated-wrong-token", "no-revision"],
)
async def test_a_refusal_says_what_to_do(
    tmp_path: Path,
    hub: Hub,
    repo: dict[str, Any],
    token: str | None,
    error_type: type[RbeeError],
    code: str,
    words: str,
) -> None:
    hub.add("org/closed", small_model(), **repo)
    async with running_store(tmp_path, hub, token=token) as store:
        with pytest.raises(error_type, match=words) as error:
            await store.fetch("org/closed")

    assert error.value.code == code
    assert "hf_" not in error.value.details
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("status", [401, 403])
async def test_a_bare_refusal_of_a_file_says_what_to_do(tmp_path: Path, hub: Hub, status: int) -> None:
    hub.fail("status", "/resolve/", status=status)
    async with running_store(tmp_path, hub) as store:
        with pytest.raises(Forbidden, match="HF_TOKEN") as error:
            await store.fetch("org/tiny")

    assert error.value.code == "hub_access_denied"


async def test_an_unknown_model_is_named(tmp_path: Path, hub: Hub) -> None:
    async with running_store(tmp_path, hub) as store:
        with pytest.raises(NotFound, match="'org/none'"):
            await store.fetch("org/none")


async def test_the_token_goes_to_the_hub_and_not_where_it_redirects(tmp_path: Path, hub: Hub) -> None:
    hub.add("org/closed", MODEL, token="hf_right")
    async with running_store(tmp_path, hub, token="hf_right") as store:
        await store.fetch("org/closed")

    at_hub = [asked for asked in hub.asked if asked.server == "hub"]
    at_cdn = [asked for asked in hub.asked if asked.server == "cdn"]
    assert {asked.headers.get("authorization") for asked in at_hub} == {"Bearer hf_right"}
    assert all(asked.headers["user-agent"].startswith("rbee/") for asked in at_hub)
    assert [asked.path for asked in at_hub if "/resolve/" not in asked.path] == ["/api/models/org/closed"]
    assert at_cdn
    assert all("authorization" not in asked.headers for asked in at_cdn)


@pytest.mark.parametrize("path", [WEIGHTS, "tokenizer.json"], ids=["large", "small"])
@pytest.mark.parametrize("kind", ["corrupt", "longer"])
async def test_wrong_bytes_are_fetched_once_more(tmp_path: Path, hub: Hub, kind: Kind, path: str) -> None:
    """F43: never listed, moved aside, one fresh try."""
    where = hub.content_path("org/tiny", path) if path == WEIGHTS else f"/{path}"
    hub.fail(kind, where, times=1)
    told = Told()
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/tiny", told)

    assert "model_download_mismatch" in told.actions()
    assert files_of(tmp_path / "models/org/tiny") == hub.repos["org/tiny"].files
    assert hub.bodies(where)[1].headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("kind", ["corrupt", "longer"])
async def test_bytes_that_stay_wrong_are_an_error_and_never_listed(
    tmp_path: Path, hub: Hub, kind: Kind
) -> None:
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail(kind, path)
    async with running_store(tmp_path, hub) as store:
        with pytest.raises(RbeeError, match=WEIGHTS) as error:
            await store.fetch("org/tiny")

        assert error.value.code == "checksum_mismatch"
        assert not error.value.retryable
        assert len(hub.bodies(path)) == 2
        assert store.listed() == []
        assert any(name.endswith(".wrong") for name in store.staged())
        hub.heal()
        await store.fetch("org/tiny")
        assert store.listed() == ["org/tiny"]
        assert store.staged() == []


@pytest.mark.parametrize(("kind", "skip"), [("new_etag", 1), ("no_ranges", 0)], ids=["changed", "no-ranges"])
async def test_a_file_that_cannot_go_on_begins_again(tmp_path: Path, hub: Hub, kind: Kind, skip: int) -> None:
    path = hub.content_path("org/tiny", WEIGHTS)
    hub.fail("reset", path, after=700_000, times=1)
    hub.fail(kind, path, skip=skip)
    told = Told()
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/tiny", told)

    assert "model_download_restart" in told.actions()
    assert files_of(tmp_path / "models/org/tiny") == hub.repos["org/tiny"].files


HOSTILE = {
    "up": "../../evil",
    "inner-up": "a/../../evil",
    "absolute": "/tmp/evil",
    "nul": "a\0b",
    "newline": "a\nb",
    "backslash": "..\\evil",
    "dot": "a/./b",
    "empty-part": "a//b",
    "empty": "",
    "long-name": "x" * 256,
    "long-path": "/".join(["x" * 100] * 12),
    "deep": "/".join("x" * 17),
    "surrogate": "a\ud800b",
    "folder-and-file": "config.json/x",
    "twice": "config.json",
}


@pytest.mark.parametrize("path", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_hostile_file_name_is_refused_before_the_disk_is_touched(
    tmp_path: Path, hub: Hub, path: str
) -> None:
    """F45."""
    honest = [{"rfilename": "config.json", "size": 2, "blobId": "0" * 40}]
    hub.add("org/evil", small_model()).listed = [
        *honest,
        {"rfilename": path, "size": 2, "blobId": "0" * 40},
    ]
    async with running_store(tmp_path, hub) as store:
        with pytest.raises(InvalidRequest, match="refused") as error:
            await store.fetch("org/evil")

    assert error.value.code == "unsafe_file_name"
    assert not (tmp_path / "models").exists()
    assert hub.bodies("/resolve/") == []


@pytest.mark.parametrize(
    "sibling",
    [
        {"rfilename": "w.bin"},
        {"rfilename": "w.bin", "size": 5},
        {"rfilename": "w.bin", "size": -1, "blobId": "0" * 40},
        {"rfilename": "w.bin", "size": 5, "blobId": "../../x"},
        {"rfilename": "w.bin", "size": 5, "lfs": {"sha256": "../x", "size": 5, "pointerSize": 1}},
        {"size": 5},
        "w.bin",
    ],
    ids=["bare", "no-id", "negative", "bad-id", "bad-sum", "no-name", "no-object"],
)
async def test_a_hub_that_lists_no_sums_is_no_hub(tmp_path: Path, hub: Hub, sibling: Any) -> None:
    hub.add("org/odd", small_model()).listed = [sibling]
    async with running_store(tmp_path, hub) as store:
        with pytest.raises(Unavailable, match="HF_ENDPOINT") as error:
            await store.fetch("org/odd")

    assert error.value.code == "hub_protocol_error"


async def test_hidden_files_are_left_out(tmp_path: Path, hub: Hub) -> None:
    hub.add("org/hidden", small_model() | {".rbee.json": b"{}", ".git/config": b"x", "a/.b/c": b"y"})
    async with running_store(tmp_path, hub) as store:
        await store.fetch("org/hidden")

        assert [f.path for f in store.models.get("org/hidden").file_list] == ["config.json", WEIGHTS]


@pytest.mark.timeout(300)
@given(
    faults=st.lists(
        st.tuples(
            st.sampled_from(["reset", "truncate", "corrupt", "longer", "new_etag", "no_ranges", "status"]),
            st.integers(0, 400_000),
            st.integers(1, 2),
        ),
        max_size=4,
    )
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_goes_wrong_the_model_is_whole_or_not_there(
    tmp_path_factory: pytest.TempPathFactory, faults: list[tuple[Kind, int, int]]
) -> None:
    weights = bytes(range(256)) * 1500
    folder = tmp_path_factory.mktemp("faulty")

    async def main() -> None:
        with running_hub() as hub:
            hub.add("org/m", small_model(weights))
            for kind, after, times in faults:
                hub.fail(kind, hub.content_path("org/m", WEIGHTS), after=after, times=times)
            async with running_store(folder, hub) as store:
                for _ in range(8):
                    try:
                        await store.fetch("org/m")
                        break
                    except RbeeError:
                        assert store.listed() == []
                assert files_of(folder / "models/org/m") == small_model(weights)
                assert store.staged("org/m") == []
                assert store.models.space.reserved == 0

    anyio.run(main)
