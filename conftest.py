"""What all tests share."""

from collections.abc import Iterator

import psutil
import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests on asyncio, which uvicorn and vLLM use too."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fail the run when a test has left a process behind."""
    yield
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=5)
    left = [
        " ".join(process.cmdline())
        for process in alive
        if "resource_tracker" not in " ".join(process.cmdline())
    ]
    assert not left, f"processes left behind: {left}"
