"""What all tests share."""

import os
from collections.abc import Iterator

import psutil
import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG
from hypothesis import HealthCheck, settings
from rbee_processes import is_alive, title_of

# A machine that stops for a moment is no fault of what is tested.
settings.register_profile(
    "any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests on asyncio, which uvicorn and vLLM use too."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def patient_requests() -> None:
    """Have httpx wait longer than its 5 s where a test says nothing: the machine may have more to do."""
    for phase in ("connect", "read", "write", "pool"):
        setattr(DEFAULT_TIMEOUT_CONFIG, phase, 45.0)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what services write out of the home of who runs the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fail the run when a test has left a process behind."""
    yield
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=5)
    titles = [title_of(process) for process in alive if is_alive(process)]
    left = [title for title in titles if title and "resource_tracker" not in title]
    assert not left, f"processes left behind: {left}"
