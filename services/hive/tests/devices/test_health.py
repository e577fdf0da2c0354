"""What readings and Xids say about a GPU's health."""

from typing import Any

import pynvml
import pytest

from rbee_hive.devices.health import CRITICAL, OF_PROGRAMS, WORTH_A_LOOK, judge
from rbee_hive.devices.testing import gpu


@pytest.mark.parametrize(
    ("facts", "xids", "health", "words"),
    [
        ({}, {}, "ok", []),
        ({"lost": "GPU is lost"}, {}, "failed", ["cannot be reached: GPU is lost"]),
        ({"ecc_uncorrected": 3}, {}, "failed", ["3 memory errors could not be mended"]),
        ({"ecc_uncorrected": None}, {}, "ok", []),
        ({"repair_failed": True}, {}, "failed", ["should be exchanged"]),
        ({"repair_pending": True}, {}, "degraded", ["at the next reset"]),
        ({"slowdown": pynvml.nvmlClocksEventReasonHwThermalSlowdown}, {}, "degraded", ["too hot"]),
        ({"slowdown": pynvml.nvmlClocksEventReasonSwThermalSlowdown}, {}, "degraded", ["too hot"]),
        ({"slowdown": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown}, {}, "degraded", ["power supply"]),
        ({"slowdown": pynvml.nvmlClocksEventReasonGpuIdle}, {}, "ok", []),
        ({"slowdown": pynvml.nvmlClocksEventReasonSwPowerCap}, {}, "ok", []),
        ({"recovery": pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET}, {}, "failed", ["must be reset"]),
        ({"recovery": pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET}, {}, "degraded", ["have ended"]),
        ({"without_slices": True}, {}, "failed", ["nvidia-smi mig"]),
        ({}, {48: 1}, "failed", ["Xid 48: a memory error with two wrong bits"]),
        ({}, {79: 2}, "failed", ["Xid 79 (2 times): it has fallen off the bus"]),
        ({}, {63: 1}, "degraded", ["Xid 63"]),
        ({}, {94: 1}, "degraded", ["Xid 94"]),
        ({}, {999: 1}, "degraded", ["see NVIDIA's list"]),
        ({}, {13: 5, 31: 1, 43: 1, 45: 9}, "ok", []),
        ({"repair_pending": True}, {63: 1, 95: 1}, "failed", ["at the next reset", "Xid 63", "Xid 95"]),
    ],
    ids=[
        "well", "lost", "ecc", "no-ecc", "repair-failed", "repair-pending", "hot", "hot-by-driver", "power",
        "idle", "power-cap", "reset", "drain", "mig-empty", "xid-48", "xid-79-twice", "xid-63", "xid-94",
        "xid-unknown", "xids-of-programs", "the-worst-counts",
    ],
)  # fmt: skip
def test_health(facts: dict[str, Any], xids: dict[int, int], health: str, words: list[str]) -> None:
    judgement = judge(gpu(0, **facts), xids)

    assert judgement.health == health
    assert len(judgement.issues) == len(words)
    assert all(word in issue for word, issue in zip(words, judgement.issues, strict=True))


def test_an_xid_means_one_thing() -> None:
    assert not OF_PROGRAMS & CRITICAL.keys()
    assert not OF_PROGRAMS & WORTH_A_LOOK.keys()
    assert not CRITICAL.keys() & WORTH_A_LOOK.keys()
