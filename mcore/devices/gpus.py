"""The GPUs of this machine, as `nvidia-smi` tells them. No torch: asking takes a tenth of a second."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PROGRAM = "nvidia-smi"
FIELDS = ("index", "uuid", "memory.total", "memory.used", "driver_version", "name")
TIMEOUT_S = 60.0
"""Seconds for the answer: a driver that has to wake all GPUs of a node takes ten or more."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        index: Its number in the order of the PCI bus, as `nvidia-smi` and `launch.devices` count.
        uuid: What it is called whatever container looks at it.
        total_gib: Its memory.
        free_gib: What nobody uses of that now.
        driver: Version of the driver.
        name: Its model.
    """

    index: int
    uuid: str
    total_gib: float
    free_gib: float
    driver: str = ""
    name: str = ""


def installed_gpus() -> list[Gpu]:
    """All GPUs of this machine; none if it has no NVIDIA driver, or the driver does not answer."""
    if shutil.which(PROGRAM) is None:
        return []
    try:
        asked = subprocess.run(
            [PROGRAM, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parsed(asked.stdout) if asked.returncode == 0 else []


def parsed(answer: str) -> list[Gpu]:
    """The GPUs of an answer, a line each; lines that say something else are left out."""
    found = []
    for line in answer.splitlines():
        words = [word.strip() for word in line.split(",", len(FIELDS) - 1)]
        if len(words) == len(FIELDS) and words[0].isdecimal() and words[2].isdecimal() and words[3].isdecimal():
            total, used = float(words[2]) / 1024, float(words[3]) / 1024
            found.append(Gpu(int(words[0]), words[1], total, max(0.0, total - used), words[4], words[5]))
    return found


def visible(gpus: Sequence[Gpu], environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, which a scheduler may have set; all if it is not set.

    What it names otherwise than by number or UUID (parts of a GPU: MIG) is nobody's to lease, and is left out.
    """
    words = environment.get("CUDA_VISIBLE_DEVICES")
    if words is None:
        return list(gpus)
    named = [word.strip() for word in words.split(",") if word.strip()]
    return [gpu for gpu in gpus if str(gpu.index) in named or any(len(n) > 4 and gpu.uuid.startswith(n) for n in named)]
