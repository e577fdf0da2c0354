"""What the kernel does for us on a client's connections."""

import socket
import sys
from typing import Any

UNANSWERED_MS = 12_000
"""A connection ends when what was sent on it stays without an answer for this long."""

PROBE_AFTER_S = 8
"""A connection on which nothing comes for this long is asked whether its peer is still there …"""

PROBE_EVERY_S = 2
"""… and again after each of these, until `UNANSWERED_MS` have passed since its last word."""


def open_socket(address: tuple[Any, ...]) -> socket.socket:
    """Make a socket for `address` (as `getaddrinfo` gives it) that notices a vanished peer within 15 s.

    Without this, a stream whose peer lost its power or its network is only noticed by the silence: after
    the read timeout, which must be well above the services' pings.
    """
    family, kind, protocol = address[:3]
    sock = socket.socket(family, kind, protocol)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY_S)
    return sock
