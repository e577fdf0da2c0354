"""What a GPU's readings and the driver's Xids say about its health. Pure.

Which Xid means what follows NVIDIA's "Xid Errors" (docs.nvidia.com/deploy/xid-errors: the catalogue's column
of immediate actions, and "Dynamic page retirement" for 48, 63 and 64). Those that a program causes by itself
are the ones that NVIDIA's device plugin for Kubernetes leaves out of its health checks, too.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import pynvml

from rbee_hive.devices.nvml import GpuReading

Health: TypeAlias = Literal["ok", "degraded", "failed"]

RESET = "Take it out of use, then reset it with nvidia-smi --gpu-reset or restart the machine."

OF_PROGRAMS = frozenset({8, 13, 31, 32, 43, 45, 68, 69, 109})
"""Caused by the program that ran, such as a page fault; the GPU is well."""

CRITICAL: Mapping[int, str] = {
    46: "the GPU stopped processing",
    48: "a memory error with two wrong bits",
    61: "its microcontroller stopped",
    62: "its microcontroller stopped",
    64: "a damaged page or row of memory could not be replaced",
    74: "an NVLink error",
    79: "it has fallen off the bus",
    95: "a memory error that may have reached other programs",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "a memory error that could not be mended",
    143: "it could not be initialised",
}
"""Work on the GPU cannot end well until it is reset."""

WORTH_A_LOOK: Mapping[int, str] = {
    63: "a damaged page or row of memory is replaced at the next reset",
    92: "many memory errors were mended",
    94: "a memory error that one program has died of",
    154: "the driver asks for a recovery action",
}

SLOWDOWNS: Mapping[int, str] = {
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "it is too hot, and the hardware slows it down",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "it is too hot, and the driver slows it down",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "the power supply makes it slow down",
}

RECOVERIES: Mapping[int, tuple[Health, str]] = {
    pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET: ("failed", "The driver says that it must be reset."),
    pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT: (
        "failed",
        "The driver says that the machine must be restarted.",
    ),
    pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_P2P: (
        "degraded",
        "The driver says that programs on several GPUs must end.",
    ),
    pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET: (
        "degraded",
        "The driver says that it must be reset when its programs have ended.",
    ),
}

_ORDER: tuple[Health, ...] = ("ok", "degraded", "failed")


class Judgement(NamedTuple):
    """A device's health and the sentences that say why."""

    health: Health
    issues: list[str]


def judge(reading: GpuReading, xids: Mapping[int, int]) -> Judgement:
    """Say how a GPU is.

    Args:
        xids: how often each Xid was reported of it since the hive started. An Xid counts until the hive is
            started again, since nothing tells when the GPU was reset.
    """
    found: list[tuple[Health, str]] = []
    if reading.lost is not None:
        found.append(("failed", f"The GPU cannot be reached: {reading.lost}. {RESET}"))
    if reading.ecc_uncorrected:
        count = reading.ecc_uncorrected
        found.append(
            (
                "failed",
                f"{count} memory error{'s' if count > 1 else ''} could not be mended since the driver was "
                f"loaded. {RESET}",
            )
        )
    if reading.repair_failed:
        found.append(("failed", "Damaged memory could not be replaced; the GPU should be exchanged."))
    if reading.repair_pending:
        found.append(("degraded", "Damaged memory is replaced at the next reset. " + RESET))
    if reading.recovery in RECOVERIES:
        found.append(RECOVERIES[reading.recovery])
    found += [
        ("degraded", f"The clocks are low: {why}.")
        for bit, why in SLOWDOWNS.items()
        if reading.slowdown & bit
    ]
    if reading.without_slices:
        found.append(
            ("failed", "MIG mode is on and it has no slices. Make some with nvidia-smi mig -cgi … -C.")
        )
    found += [_xid(code, count) for code, count in sorted(xids.items()) if code not in OF_PROGRAMS]
    health: Health = max((level for level, _ in found), key=_ORDER.index, default="ok")
    return Judgement(health, [issue for _, issue in found])


def _xid(code: int, count: int) -> tuple[Health, str]:
    times = f" ({count} times)" if count > 1 else ""
    if code in CRITICAL:
        return "failed", f"The driver reported Xid {code}{times}: {CRITICAL[code]}. {RESET}"
    what = WORTH_A_LOOK.get(code, "see NVIDIA's list of Xid errors")
    return "degraded", f"The driver reported Xid {code}{times}: {what}."
