"""What a Python environment has, told without importing any of it: torch alone takes seconds.

Only the standard library is imported, and nothing of ours: another interpreter, which may have none of it, is given
this file's text.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "megatron-core", "transformer-engine")
TIMEOUT_S = 60.0


def describe() -> dict[str, Any]:
    """Versions of what is there, whether vLLM and this code are found, and the CUDA version that torch is built for."""
    found: dict[str, Any] = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["vllm"] = _version_of_module("vllm")
    found["mcore"] = importlib.util.find_spec("mcore") is not None
    return found | {"cuda": torch_cuda()}


def describe_other(python: str) -> dict[str, Any]:
    """The same of another interpreter's environment.

    Raises:
        OSError: There is no such interpreter.
        subprocess.TimeoutExpired: It does not answer.
        ValueError: It is none, or is broken.
    """
    command = [python, "-c", Path(__file__).read_text()]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if asked.returncode:
        raise ValueError((asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"])[-1])
    found: dict[str, Any] = json.loads(asked.stdout)
    return found


def torch_cuda() -> str | None:
    """CUDA version that torch is built for, such as `12.8`; None for a build without, or no torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^cuda\b.*= *['\"]([0-9.]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


def _version_of_module(module: str) -> str | None:
    """Version of whatever distribution brings a module: vLLM's has another name for each kind of device."""
    if importlib.util.find_spec(module) is None:
        return None
    for name in metadata.packages_distributions().get(module, ()):
        return metadata.version(name)
    return "unknown"


if __name__ == "__main__":
    json.dump(describe(), sys.stdout)
