"""The real command in a process of its own, with a home that shows whether anything was written there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name("mcore-flows")


def mcore_flows(
    *arguments: object, cwd: Path, home: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `mcore-flows` and wait for its end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    if home is not None:
        environment |= {"HOME": str(home), "PREFECT_HOME": str(home / ".prefect")}
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)], cwd=cwd, env=environment | variables, capture_output=True, text=True
    )
