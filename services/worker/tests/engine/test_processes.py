"""Processes below this one are found and ended, those whose parent is gone too."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import pytest

from rbee_worker.engine.processes import OwnedProcesses, descendants

pytestmark = pytest.mark.anyio

# A process with a child, both of which take no notice of SIGTERM; tells the child's pid.
_FAMILY = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
"""


@contextmanager
def family() -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", _FAMILY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        yield parent, int(parent.stdout.readline())
        parent.kill()


async def ended(owned: OwnedProcesses) -> None:
    with anyio.fail_after(45):
        while owned.kill():  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def test_ends_the_whole_family() -> None:
    owned = OwnedProcesses()
    with family() as (parent, grandchild):
        owned.scan()
        assert set(owned.alive()) == {parent.pid, grandchild}

        await ended(owned)

        assert owned.alive() == []
    owned.close()


async def test_ends_a_grandchild_whose_parent_has_died() -> None:
    owned = OwnedProcesses()
    # It would end with its parent, whose pipe it reads; a stopped one does not.
    with family() as (parent, grandchild):
        os.kill(grandchild, signal.SIGSTOP)
        owned.scan()
        parent.kill()
        parent.wait()
        assert grandchild not in descendants()
        assert owned.alive() == [grandchild]

        await ended(owned)
    owned.close()


async def test_leaves_alone_what_was_there_before() -> None:
    with family() as (parent, grandchild):
        owned = OwnedProcesses()

        assert owned.kill() == []
        assert descendants()[grandchild] == parent.pid
        owned.close()
