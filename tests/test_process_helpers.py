"""The tests' own view of processes holds while these come and go."""

import subprocess
import sys
from typing import Any

import psutil
from rbee_processes import is_alive, title_of


def test_a_process_that_ends_while_it_is_looked_at_is_not_alive_and_has_no_title() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:

        class Ending(psutil.Process):
            """One that ends just after its existence has been checked."""

            def status(self) -> Any:
                child.kill()
                child.wait()
                return super().status()

        process = Ending(child.pid)
        assert is_alive(child.pid)
        assert "time.sleep(600)" in title_of(process)
        assert not is_alive(process)
    assert not is_alive(child.pid)
    assert title_of(process) == ""
