"""Models from other hives: the routes that serve them, and downloads that take from them."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import msgspec
import pytest
from hub_server import Hub, running_hub
from rbee_downloads import IMPATIENT, Told, files_of, running_store, small_model
from rbee_inprocess import Running, eventually, running

from rbee_contracts.errors import NotFound, RbeeError, Unavailable
from rbee_contracts.nodes import HiveInfo, HiveListResult, ModelInfo
from rbee_contracts.operations import HiveList
from rbee_hive.models import Models, QueenPeers, model_routes, peers
from rbee_hive.models.routes import readings
from rbee_hive.models.source import Peer
from rbee_job_server.access import AccessConfig

WEIGHTS = "model.safetensors"
BIG = bytes(range(256)) * 12_000
TOKEN = "t" * 32


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def place(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


@asynccontextmanager
async def other_hive(root: Path, token: str | None = None) -> AsyncIterator[Running]:
    """Run another hive's model routes, over `root`."""
    models = Models(root, gguf=True)
    async with (
        running({}, routes=model_routes(models), access=AccessConfig(token=token)) as hive,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(models.compute_sums)
        yield hive
        tasks.cancel_scope.cancel()


class Named:
    """Peers as a test names them."""

    def __init__(self, *urls: str) -> None:
        self._urls = urls

    async def holders(self, model: str) -> Sequence[Peer]:
        return [Peer(f"box{number}", url) for number, url in enumerate(self._urls, 2)]


# --- the routes ----------------------------------------------------------------------------------------


async def test_a_manifest_has_every_file_with_its_sum(tmp_path: Path) -> None:
    place(tmp_path / "org/name@v1", small_model() | {"sub/extra.json": b"{}"})
    async with other_hive(tmp_path) as hive:
        answer = await hive.http.get("/v1/models/org/name@v1/manifest")

    info = msgspec.json.decode(answer.content, type=ModelInfo)
    assert [file.path for file in info.file_list] == ["config.json", WEIGHTS, "sub/extra.json"]
    assert all(file.sha256 is not None for file in info.file_list)


async def test_a_file_is_served_whole_and_by_range_under_its_sum(tmp_path: Path) -> None:
    place(tmp_path / "org/name", small_model(b"0123456789"))
    async with other_hive(tmp_path) as hive:
        manifest = (await hive.http.get("/v1/models/org/name/manifest")).json()
        path = f"/v1/models/org/name/files/{WEIGHTS}"
        whole = await hive.http.get(path)
        etag = whole.headers["etag"]
        part = await hive.http.get(path, headers={"Range": "bytes=3-5", "If-Range": etag})
        changed = await hive.http.get(path, headers={"Range": "bytes=3-5", "If-Range": '"other"'})
        beyond = await hive.http.get(path, headers={"Range": "bytes=10-"})

    assert etag == f'"{manifest["file_list"][1]["sha256"]}"'
    assert (whole.status_code, whole.content) == (200, b"0123456789")
    assert (part.status_code, part.content) == (206, b"345")
    assert part.headers["content-range"] == "bytes 3-5/10"
    assert (changed.status_code, changed.content) == (200, b"0123456789")
    assert beyond.status_code == 416


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/org/name/files/../../../secret",
        "/v1/models/org/name/files/%2e%2e/%2e%2e/secret",
        "/v1/models/org/name/files//etc/passwd",
        "/v1/models/org/name/files/.rbee.json",
        "/v1/models/org/name/files/link",
        "/v1/models/org/name/files/",
        "/v1/models/org/name/files/config.json%00",
        "/v1/models/../secret/files/x",
        "/v1/models/org/none/files/config.json",
        "/v1/models/org/none/manifest",
        "/v1/models/.hidden/manifest",
        "/v1/models/org/name",
    ],
)
async def test_what_the_catalogue_does_not_list_is_not_served(tmp_path: Path, path: str) -> None:
    place(tmp_path / "models/org/name", small_model() | {".rbee.json": b"{}"})
    place(tmp_path / "models/.hidden", small_model())
    (tmp_path / "secret").write_bytes(b"secret")
    async with other_hive(tmp_path / "models") as hive:
        url = httpx.URL(hive.url).copy_with(raw_path=path.encode())
        answer = await hive.http.get(url)

    assert answer.status_code == 404
    assert set(answer.json()) >= {"error", "details", "code"}
    assert b"secret" not in answer.content.replace(b"/secret", b"")


async def test_the_routes_ask_for_the_token(tmp_path: Path) -> None:
    place(tmp_path / "m", small_model())
    async with other_hive(tmp_path, TOKEN) as hive:
        for path in ("manifest", "files/config.json"):
            refused = await hive.http.get(f"/v1/models/m/{path}")
            assert refused.status_code == 401


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("m/files/a", [("m", "a")]),
        ("o/m/files/a/b", [("o/m", "a/b")]),
        ("x/files/files/a", [("x", "files/a"), ("x/files", "a")]),
        ("m/files", []),
        ("../files/a", []),
        ("a/b/c/files/d", []),
    ],
)
def test_a_path_is_read_in_every_way_it_can_be_meant(rest: str, expected: list[tuple[str, str]]) -> None:
    assert list(readings(rest)) == expected


async def test_a_gguf_file_alone_is_served_under_its_own_name(tmp_path: Path) -> None:
    place(tmp_path, {"m.gguf": b"GGUF"})
    async with other_hive(tmp_path) as hive:
        manifest = await hive.http.get("/v1/models/m.gguf/manifest")
        answer = await hive.http.get("/v1/models/m.gguf/files/m.gguf")

    assert [file["path"] for file in manifest.json()["file_list"]] == ["m.gguf"]
    assert answer.content == b"GGUF"


# --- taking from them ----------------------------------------------------------------------------------


async def test_a_model_comes_from_another_hive(tmp_path: Path) -> None:
    files = small_model(BIG) | {"sub/ä b.json": b"{}"}
    place(tmp_path / "theirs/rbee-tiny", files)
    told = Told()
    async with (
        other_hive(tmp_path / "theirs", TOKEN) as hive,
        running_store(tmp_path, peers=Named(hive.url), cluster_token=TOKEN) as store,
    ):
        outcome = await store.fetch("rbee-tiny", told)

        assert outcome.source == "hive box2"
        assert store.listed() == ["rbee-tiny"]
    assert files_of(tmp_path / "models/rbee-tiny") == files
    assert told.progress()[-1].bytes_done == told.progress()[-1].bytes_total


@pytest.mark.parametrize("source", ["auto", "hub"])
async def test_the_hub_has_it_where_the_other_hive_is_gone_or_not_asked(
    tmp_path: Path, hub: Hub, source: str
) -> None:
    hub.add("org/tiny", small_model(BIG))
    told = Told()
    async with running_store(tmp_path, hub, peers=Named("http://127.0.0.1:9")) as store:
        outcome = await store.fetch("org/tiny", told, source=source)  # type: ignore[arg-type]

    assert outcome.source == "the hub"
    assert ("model_download_fallback" in told.actions()) == (source == "auto")


async def test_a_hive_that_dies_in_the_middle_is_followed_by_the_hub_from_where_it_was(
    tmp_path: Path, hub: Hub
) -> None:
    """The dying hive is a hub's content server here: both speak ranges, and this one can be held and cut."""
    hub.add("org/tiny", small_model(BIG))
    place(tmp_path / "theirs/org/tiny", small_model(BIG))
    told = Told()
    with running_hub() as dying:
        dying.add("org/tiny", small_model(BIG))
        async with other_hive(tmp_path / "theirs") as hive:
            manifest = (await hive.http.get("/v1/models/org/tiny/manifest")).content
        dying.pages["/v1/models/org/tiny/manifest"] = manifest
        for path, data in small_model(BIG).items():
            dying.pages[f"/v1/models/org/tiny/files/{path}"] = data
        dying.fail("reset", f"/files/{WEIGHTS}", after=2_000_000, times=1)
        dying.fail("status", f"/files/{WEIGHTS}", status=500, skip=1)
        async with running_store(tmp_path, hub, peers=Named(dying.url)) as store:
            outcome = await store.fetch("org/tiny", told)

    assert outcome.source == "the hub"
    (body,) = hub.bodies(hub.content_path("org/tiny", WEIGHTS))
    start = int(body.headers["range"].removeprefix("bytes=").partition("-")[0])
    assert start > 0
    assert "if-range" not in body.headers or body.headers["if-range"].startswith('"')
    assert files_of(tmp_path / "models/org/tiny") == small_model(BIG)


async def test_the_hub_knows_again_what_came_from_another_hive(tmp_path: Path, hub: Hub) -> None:
    """By git's sums of the small files, which another hive does not tell: nothing is fetched or replaced."""
    commit = hub.add("org/tiny", small_model(BIG)).commit
    async with running_store(tmp_path / "first", hub) as first:
        await first.fetch("org/tiny")
    asked = len(hub.bodies("/resolve/")) + len(hub.bodies("/blobs/"))
    users = {"org/tiny": ["worker-1"]}
    async with (
        other_hive(tmp_path / "first/models") as hive,
        running_store(tmp_path, hub, peers=Named(hive.url), users=users) as store,
    ):
        assert (await store.fetch("org/tiny")).source == "hive box2"
        assert store.models.get("org/tiny").revision == commit
        assert (await store.fetch("org/tiny")).source is None

    assert len(hub.bodies("/resolve/")) + len(hub.bodies("/blobs/")) == asked


async def test_a_hive_that_sends_wrong_bytes_is_not_believed(tmp_path: Path, hub: Hub) -> None:
    place(tmp_path / "theirs/m", small_model(BIG))
    with running_hub() as liar:
        async with other_hive(tmp_path / "theirs") as hive:
            liar.pages["/v1/models/m/manifest"] = (await hive.http.get("/v1/models/m/manifest")).content
        for path, data in small_model(BIG[::-1]).items():
            liar.pages[f"/v1/models/m/files/{path}"] = data
        async with running_store(tmp_path, hub, peers=Named(liar.url)) as store:
            with pytest.raises(RbeeError) as error:
                await store.fetch("m", source="hive")

            assert error.value.code == "checksum_mismatch"
            assert store.listed() == []


@pytest.mark.parametrize(
    ("page", "code"),
    [
        (b"{}", "peer_protocol_error"),
        (b"\xff", "peer_protocol_error"),
        (b'{"model":"m","size":1,"files":1,"file_list":[{"path":"a","size":1}]}', "peer_protocol_error"),
        (b'{"model":"x","size":1,"files":0}', "peer_protocol_error"),
        (None, "model_not_found"),
    ],
    ids=["empty", "no-text", "no-sum", "another-model", "gone"],
)
async def test_a_hive_that_lists_nonsense_is_an_error(
    tmp_path: Path, hub: Hub, page: bytes | None, code: str
) -> None:
    if page is not None:
        hub.pages["/v1/models/m/manifest"] = page
    async with running_store(tmp_path, peers=Named(hub.url)) as store:
        with pytest.raises(RbeeError) as error:
            await store.fetch("m", source="hive")

    assert error.value.code == code


async def test_a_list_is_read_to_its_bound_and_no_further(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "MAX_MANIFEST_BYTES", 1000)
    hub.pages["/v1/models/m/manifest"] = b'{"model":"m","size":1,"files":0}' + b" " * 1000
    async with running_store(tmp_path, peers=Named(hub.url)) as store:
        with pytest.raises(RbeeError) as error:
            await store.fetch("m", source="hive")

    assert error.value.code == "peer_protocol_error"


async def test_hostile_names_from_a_hive_are_refused(tmp_path: Path, hub: Hub) -> None:
    evil = [{"path": "../../evil", "size": 1, "sha256": "0" * 64}]
    hub.pages["/v1/models/m/manifest"] = msgspec.json.encode(
        {"model": "m", "size": 1, "files": 1, "file_list": evil}
    )
    async with running_store(tmp_path, peers=Named(hub.url)) as store:
        with pytest.raises(RbeeError) as error:
            await store.fetch("m", source="hive")

    assert error.value.code == "unsafe_file_name"
    assert not (tmp_path / "models").exists()


async def test_the_clusters_token_is_not_sent_where_a_hive_redirects(tmp_path: Path, hub: Hub) -> None:
    hub.fail("status", "/v1/models/", status=302, headers={"Location": f"{hub.cdn_url}/catch"})
    async with running_store(tmp_path, peers=Named(hub.url), cluster_token=TOKEN) as store:
        with pytest.raises(Unavailable):
            await store.fetch("m", source="hive")

    assert {asked.server for asked in hub.asked} == {"hub"}


async def test_a_hive_whose_token_differs_says_so(tmp_path: Path) -> None:
    place(tmp_path / "theirs/m", small_model())
    async with (
        other_hive(tmp_path / "theirs", TOKEN) as hive,
        running_store(tmp_path, peers=Named(hive.url), cluster_token="x" * 32) as store,
    ):
        with pytest.raises(RbeeError, match="same one") as error:
            await store.fetch("m", source="hive")

    assert error.value.code == "peer_refused"


async def test_a_hive_that_still_computes_sums_is_asked_again(tmp_path: Path, hub: Hub) -> None:
    place(tmp_path / "theirs/m", small_model())
    async with other_hive(tmp_path / "theirs") as hive:
        hub.pages["/v1/models/m/manifest"] = (await hive.http.get("/v1/models/m/manifest")).content
    for path, data in small_model().items():
        hub.pages[f"/v1/models/m/files/{path}"] = data
    hub.fail("status", "/manifest", status=503, times=2, headers={"Retry-After": "0"})
    async with running_store(tmp_path, peers=Named(hub.url), patience=IMPATIENT) as store:
        await store.fetch("m", source="hive")

        assert store.listed() == ["m"]


# --- the queen's word ----------------------------------------------------------------------------------


def hive_info(hive_id: str, state: str, *models: str, last_seen_s: float = 0.5) -> HiveInfo:
    return HiveInfo(
        hive_id=hive_id,
        url=f"http://{hive_id}:7835/",
        state=state,  # type: ignore[arg-type]
        version="0",
        last_seen_s=last_seen_s,
        models=[ModelInfo(model=model, size=1, files=1) for model in models],
    )


async def test_the_queen_names_the_others_that_are_online_and_have_it() -> None:
    async def hive_list(_: HiveList, __: object) -> HiveListResult:
        return HiveListResult(
            hives=[
                hive_info("me", "online", "m"),
                hive_info("older", "online", "m", last_seen_s=0.9),
                hive_info("newer", "online", "m", "other", last_seen_s=0.1),
                hive_info("away", "unreachable", "m"),
                hive_info("without", "online", "m@v1"),
            ]
        )

    async with running({HiveList: hive_list}, service="queen", actor="queen") as queen:
        found = await QueenPeers(queen.url, None, "me").holders("m")

    assert [(peer.hive_id, peer.url) for peer in found] == [
        ("newer", "http://newer:7835"),
        ("older", "http://older:7835"),
    ]


async def test_a_queen_that_does_not_answer_is_an_error_for_the_source_hive(tmp_path: Path, hub: Hub) -> None:
    hub.add("org/tiny", small_model())
    peers = QueenPeers("http://127.0.0.1:9", None, "me")
    async with running_store(tmp_path, hub, peers=peers) as store:
        with pytest.raises(RbeeError):
            await store.fetch("org/tiny", source="hive")
        told = Told()
        outcome = await store.fetch("org/tiny", told)

    assert outcome.source == "the hub"
    assert "model_download_fallback" in told.actions()


async def test_a_queen_that_cannot_list_her_hives_is_an_error() -> None:
    async def hive_list(_: HiveList, __: object) -> None:
        raise NotFound("no hives today")

    async with running({HiveList: hive_list}, service="queen", actor="queen") as queen:
        with pytest.raises(Unavailable, match="no hives today"):
            await QueenPeers(queen.url, None, "me").holders("m")


async def test_a_cut_transfer_from_a_hive_goes_on(tmp_path: Path, hub: Hub) -> None:
    place(tmp_path / "theirs/m", small_model(BIG))
    async with other_hive(tmp_path / "theirs") as hive:
        hub.pages["/v1/models/m/manifest"] = (await hive.http.get("/v1/models/m/manifest")).content
    for path, data in small_model(BIG).items():
        hub.pages[f"/v1/models/m/files/{path}"] = data
    hub.fail("reset", WEIGHTS, after=1_200_000, times=2)
    async with running_store(tmp_path, peers=Named(hub.url)) as store:
        await store.fetch("m", source="hive")
        await eventually(lambda: store.listed() == ["m"], "it is listed")

    assert [("range" in asked.headers) for asked in hub.bodies(WEIGHTS)] == [False, True, True]
