"""Ports are the lowest free from 9300."""

import socket

import pytest
from rbee_contracts.errors import NoCapacity
from rbee_hive.ports import FIRST_PORT, LAST_PORT, choose_port


def test_a_port_is_free_and_not_one_of_ours() -> None:
    first = choose_port(())
    second = choose_port({first})

    assert FIRST_PORT <= first < second <= LAST_PORT


def test_a_port_that_is_listened_on_is_passed_over() -> None:
    port = choose_port(())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()

        assert choose_port(()) > port


def test_none_left() -> None:
    with pytest.raises(NoCapacity):
        choose_port(range(FIRST_PORT, LAST_PORT + 1))
