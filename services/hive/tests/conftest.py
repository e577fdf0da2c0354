"""What the hive's tests share."""

from collections.abc import Iterator

import huggingface_hub.constants
import pytest


@pytest.fixture(autouse=True)
def the_hub_may_be_asked() -> Iterator[None]:
    """Undo what a vLLM engine in this process has set for good: it forbids the hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield
