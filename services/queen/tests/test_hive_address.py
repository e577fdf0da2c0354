"""Which addresses a hive may name (F50)."""

import msgspec
import pytest

from rbee_contracts.errors import InvalidRequest
from rbee_contracts.nodes import HiveReady
from rbee_queen.fleet.address import checked_url, literal, own_url, parse


def check(url: str, *resolved: str, peer: str = "10.0.0.9", has_token: bool = True) -> str:
    parts = parse(url)
    given = literal(parts)
    return checked_url(parts, resolved or [str(given)], peer, has_token=has_token)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://10.0.0.9:7835",
        "http://10.0.0.9",
        "http://user@10.0.0.9:7835",
        "http://user:secret@10.0.0.9:7835",
        "http://10.0.0.9:7835@evil:1",
        "http://10.0.0.9:7835/path",
        "http://10.0.0.9:7835?q",
        "http://10.0.0.9:7835#f",
        "http://10.0.0.9:99999",
        "http://10.0.0.9:0",
        "http://:7835",
        "http://[::1",
        "nonsense",
        "",
    ],
)
def test_only_a_scheme_a_host_and_a_port(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(url)

    assert refused.value.code == "invalid_hive_url"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "::ffff:127.0.0.1",
        "169.254.169.254",
        "169.254.1.1",
        "fe80::1",
        "fe80::1%eth0",
        "100.100.100.200",
        "168.63.129.16",
        "fd00:ec2::254",
        "::ffff:169.254.169.254",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "ff02::1",
    ],
)
def test_what_is_no_hives_address_is_refused_by_name_and_by_number(address: str) -> None:
    with pytest.raises(InvalidRequest, match=r"loopback|no address of a hive"):
        check("http://hive.example:7835", address)
    with pytest.raises(InvalidRequest):
        check("http://hive.example:7835", "10.0.0.7", address)


def test_the_address_that_was_compared_is_the_one_that_is_used() -> None:
    assert check("http://hive.example:7835", "10.0.0.7", "10.0.0.8") == "http://10.0.0.7:7835"
    assert check("http://hive.example:7835/", "2001:db8::7") == "http://[2001:db8::7]:7835"
    assert check("https://hive.example:7835", "10.0.0.7") == "https://hive.example:7835"


def test_a_host_without_an_address_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="has no address"):
        checked_url(parse("http://hive.example:1"), [], "10.0.0.9", has_token=True)


def test_loopback_is_believed_of_a_loopback_peer_only() -> None:
    assert check("http://127.0.0.1:9", peer="127.0.0.1") == "http://127.0.0.1:9"
    assert check("http://[::1]:9", peer="::ffff:127.0.0.1") == "http://[::1]:9"
    assert check("http://10.0.0.7:9", peer="127.0.0.1") == "http://10.0.0.7:9"


def test_without_a_token_a_hive_names_only_where_it_speaks_from() -> None:
    assert check("http://10.0.0.9:7", peer="10.0.0.9", has_token=False) == "http://10.0.0.9:7"
    with pytest.raises(InvalidRequest, match="only in a cluster with a token"):
        check("http://10.0.0.7:7", peer="10.0.0.9", has_token=False)
    with pytest.raises(InvalidRequest, match="only in a cluster with a token"):
        check("http://10.0.0.7:7", peer="127.0.0.1", has_token=False)


@pytest.mark.parametrize(
    ("peer", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:7835"),
        ("::1", "http://[::1]:7835"),
        ("::ffff:10.0.0.7", "http://10.0.0.7:7835"),
    ],
)
def test_a_hive_that_names_no_url_is_where_it_speaks_from(peer: str, url: str) -> None:
    assert own_url(peer, 7835) == url


ANNOUNCEMENT = {"hive_id": "box1", "boot": "b1", "started_at": "t", "version": "1", "port": 7835}


@pytest.mark.parametrize(
    "field",
    [
        {"port": 0},
        {"port": -5},
        {"port": 70_000},
        {"boot": ""},
        {"boot": "b" * 65},
        {"version": "1" * 65},
        {"hive_url": "http://" + "h" * 300},
        {"hive_id": "../x"},
    ],
    ids=["port 0", "port -5", "port 70000", "no boot", "boot", "version", "url", "id"],
)
def test_an_announcement_is_bounded_field_by_field(field: dict[str, object]) -> None:
    """What is announced is kept, and followed: no address that cannot be, and no text without an end."""
    assert msgspec.convert(ANNOUNCEMENT, HiveReady).port == 7835
    with pytest.raises(msgspec.ValidationError, match=next(iter(field))):
        msgspec.convert(ANNOUNCEMENT | field, HiveReady)
