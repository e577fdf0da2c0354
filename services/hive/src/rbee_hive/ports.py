"""Ports for workers: from 9300 up, the lowest that is free."""

import socket

from rbee_contracts.errors import NoCapacity

FIRST_PORT = 9300
LAST_PORT = 9999
BACKLOG = 1024


def listen_on_free_port(host: str) -> socket.socket:
    """Listen on the lowest port that nobody has.

    The socket is handed to the worker as it is, so nobody can take the port between choosing and using it.

    Raises:
        NoCapacity: all are taken.
    """
    for port in range(FIRST_PORT, LAST_PORT + 1):
        sock = socket.socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
        else:
            return sock
    raise NoCapacity(f"No free port for a worker between {FIRST_PORT} and {LAST_PORT}; stop a worker first.")
