"""What the kernel does for us on the listening socket; the connections it accepts inherit it."""

import socket
import sys

UNANSWERED_MS = 5_000
"""A connection ends when what was sent on it stays without an answer for this long, or when its peer has
taken nothing for this long (a window of zero bytes), though there is something to send."""

PROBE_AFTER_S = 8
"""A connection on which nothing comes for this long is asked whether its peer is still there."""

PROBE_EVERY_S = 2


def notice_gone_peers(sock: socket.socket) -> None:
    """Have connections end whose peer vanished without a word: within 11 s, busy or not.

    Without this, such a reader holds its job for a quarter of an hour, pings or not.
    """
    if sys.platform != "linux":
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY_S)
