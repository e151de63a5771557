"""What a stage asks for, and from which devices that can come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mcore.devices.gpus import Gpu, installed_gpus, visible

IN_USE_SHARE = 0.1
"""Share of a GPU's memory that may be taken while nobody holds a lease on it: a desktop, or CUDA's own context. If it
is more, somebody works there who asks no one."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or a slot of a machine without GPUs.

    Attributes:
        index: Its number.
        name: What its lock is called: a GPU's UUID, so that containers that number otherwise mean the same.
        is_gpu: Whether it is one.
        used_share: Share of its memory that is taken.
    """

    index: int
    name: str
    is_gpu: bool
    used_share: float = 0.0

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{'GPU' if self.is_gpu else 'slot'} {self.index}"


@dataclass(frozen=True, slots=True)
class Request:
    """Devices that are asked for.

    Attributes:
        count: How many.
        folder: Where the locks are.
        holder: Who asks, for people.
        devices: Numbers to choose from; all if None.
        slots: Slots that a machine without GPUs has; if None, nothing is counted there.
    """

    count: int
    folder: Path
    holder: str
    devices: tuple[int, ...] | None = None
    slots: int | None = None

    def to_json(self) -> str:
        """One word for a command line."""
        return json.dumps(asdict(self) | {"folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Back from `to_json`."""
        found = json.loads(text)
        numbers = found["devices"]
        return cls(
            count=found["count"],
            folder=Path(found["folder"]),
            holder=found["holder"],
            devices=None if numbers is None else tuple(numbers),
            slots=found["slots"],
        )

    def candidates(self) -> list[Device]:
        """Devices of this machine that it can be met from; empty if nothing is counted here."""
        found = devices_for(visible(installed_gpus()), self.slots)
        return [device for device in found if self.devices is None or device.index in self.devices]


def devices_for(gpus: Sequence[Gpu], slots: int | None) -> list[Device]:
    """What a machine with these GPUs has: the GPUs, or slots where there are none and slots are counted."""
    if gpus:
        return [Device(gpu.index, gpu.uuid, True, 1 - gpu.free_gib / gpu.total_gib) for gpu in gpus]
    return [Device(number, f"slot-{number}", False) for number in range(slots or 0)]
