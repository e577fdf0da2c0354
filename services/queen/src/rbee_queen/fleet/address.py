"""Where a hive may be reached: what it says is believed as far as nobody can use it to reach elsewhere.

The queen sends requests, and the cluster's token, to the address of a hive. An announcement therefore must
not be able to point it at the queen's own machine, or at what only a machine itself can reach, such as
the metadata service of a cloud. What is compared are the addresses that a name resolves to, and for plain
`http` the address that was compared is also the one that is used: a name that resolves differently later
changes nothing. The queen follows no redirects.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TypeAlias
from urllib.parse import SplitResult, urlsplit

from rbee_contracts.errors import InvalidRequest

Address: TypeAlias = IPv4Address | IPv6Address

METADATA = frozenset(
    map(ip_address, ("169.254.169.254", "100.100.100.200", "168.63.129.16", "fd00:ec2::254"))
)
"""Where clouds answer a machine's questions about itself; the first is link-local too."""


def own_url(peer: str, port: int) -> str:
    """Give the URL of a hive that names none: where it spoke from."""
    address = _plain(ip_address(peer))
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"


def parse(url: str) -> SplitResult:
    """Take a URL apart that a hive named.

    Raises:
        InvalidRequest: it is not of the form `http://HOST:PORT`.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise _refusal(url, f": {exc}") from exc
    bare = parts.username is None and parts.path in ("", "/") and not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or not port or not bare:
        raise _refusal(url, " is not of the form http://HOST:PORT.")
    return parts


def literal(parts: SplitResult) -> Address | None:
    """Give the address where the URL names one; None where it names a host that must be resolved."""
    try:
        return ip_address(parts.hostname or "")
    except ValueError:
        return None


def checked_url(parts: SplitResult, resolved: Sequence[str], peer: str, *, has_token: bool) -> str:
    """Give the URL at which the queen will reach a hive.

    Args:
        resolved: every address of the URL's host.
        peer: the address from which the hive spoke.
        has_token: whether the cluster has a token. Without one everything of a cluster is on one
            machine, and a hive can name nothing but the address it speaks from.

    Raises:
        InvalidRequest: one of the addresses cannot be a hive's, or not this one's.
    """
    url = f"{parts.scheme}://{parts.netloc}"
    speaker = _plain(ip_address(peer.partition("%")[0]))
    addresses = [_plain(ip_address(each.partition("%")[0])) for each in resolved]
    if not addresses:
        raise _refusal(url, ": its host has no address.")
    for address in addresses:
        if address in METADATA or address.is_link_local or address.is_multicast or address.is_unspecified:
            raise _refusal(url, f" leads to {address}, which is no address of a hive.")
        if address.is_loopback and not speaker.is_loopback:
            raise _refusal(
                url,
                f" is this machine's loopback, but the hive speaks from {peer}. "
                "Give it the address others reach it at.",
            )
        if not has_token and not address.is_loopback and address != speaker:
            raise _refusal(
                url,
                f" leads to {address}, but the hive speaks from {peer}. "
                "Another address is believed only in a cluster with a token.",
            )
    if parts.scheme == "https":
        return url  # its certificate says whether the host is the one that was meant
    return own_url(str(addresses[0]), parts.port or 0)


def _plain(address: Address) -> Address:
    """An IPv4 address as such, also where it comes as an IPv6 one."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _refusal(url: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"hive_url {url[:100]!r}{why}", code="invalid_hive_url")
