"""How often the kernel killed for want of memory: a process that was killed so looks like any other kill -9."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path


def oom_kills() -> int:
    """Kills so far, in this process's control group, or on the whole machine where that can't be asked."""
    for file in (*_of_control_group(), Path("/proc/vmstat")):
        with suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE):
                return int(found[1])
    return 0


def _of_control_group() -> list[Path]:
    """Of version 2, where a line of `/proc/self/cgroup` is `0::/path`, and of version 1, with its memory controller."""
    files = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            group = place.lstrip("/")
            if not controllers:
                files.append(Path("/sys/fs/cgroup") / group / "memory.events")
            elif "memory" in controllers.split(","):
                files.append(Path("/sys/fs/cgroup/memory") / group / "memory.oom_control")
    return files
