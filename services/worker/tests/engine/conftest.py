"""What the engine tests need of pytest."""

import warnings

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # vLLM never closes its ZeroMQ context: it is collected, and warns, during whatever test runs then
    # (the first line) or when pytest ends (the second).
    config.addinivalue_line("filterwarnings", "ignore:Unclosed context <zmq:ResourceWarning")
    warnings.filterwarnings("ignore", "Unclosed context <zmq", ResourceWarning)
