"""What the engine tests need of pytest."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # vLLM never closes its ZeroMQ context; it is collected, and warns, during whatever test runs then.
    config.addinivalue_line("filterwarnings", "ignore:Unclosed context <zmq:ResourceWarning")
