"""A worker's own token: made here, handed over by an inherited pipe, known to the hive and that worker."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

TOKEN_BYTES = 32


def new_token() -> str:
    return secrets.token_urlsafe(TOKEN_BYTES)


@contextmanager
def token_pipe(token: str) -> Iterator[int]:
    """Give the reading end of a pipe that holds `token`, for a child to inherit; it can be read once.

    A command line and an environment can be read by others, and stay readable; what was read from a pipe
    is gone.
    """
    reader, writer = os.pipe()
    try:
        os.write(writer, token.encode())  # far below what a pipe holds: never blocks
        os.close(writer)
        yield reader
    finally:
        os.close(reader)
