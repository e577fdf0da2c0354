"""Ports are the lowest free of their range, and held from the moment they are chosen."""

import pytest

from rbee_contracts.errors import NoCapacity
from rbee_hive.config import PortRange
from rbee_hive.supervisor.ports import listen_on_free_port

HOST = "127.0.0.1"


def test_a_port_that_is_held_is_not_chosen_again() -> None:
    ports = PortRange()
    with listen_on_free_port(HOST, ports) as first:
        chosen = first.getsockname()[1]
        # From the one that is held on: below it, others of this machine come and go.
        with listen_on_free_port(HOST, PortRange(first=chosen, last=ports.last)) as second:
            assert ports.first <= chosen < second.getsockname()[1] <= ports.last


def test_none_left() -> None:
    with listen_on_free_port(HOST, PortRange()) as held:
        port = held.getsockname()[1]
        with pytest.raises(NoCapacity, match="stop a worker") as raised:
            listen_on_free_port(HOST, PortRange(first=port, last=port))

    assert raised.value.code == "no_port"
