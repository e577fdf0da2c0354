"""Ports are the lowest free from 9300, and held from the moment they are chosen."""

from unittest.mock import patch

import pytest

from rbee_contracts.errors import NoCapacity
from rbee_hive.ports import FIRST_PORT, LAST_PORT, listen_on_free_port

HOST = "127.0.0.1"


def test_a_port_that_is_held_is_not_chosen_again() -> None:
    with listen_on_free_port(HOST) as first, listen_on_free_port(HOST) as second:
        ports = first.getsockname()[1], second.getsockname()[1]

    assert FIRST_PORT <= ports[0] < ports[1] <= LAST_PORT


def test_none_left() -> None:
    with patch("rbee_hive.ports.LAST_PORT", FIRST_PORT - 1), pytest.raises(NoCapacity, match="stop a worker"):
        listen_on_free_port(HOST)
