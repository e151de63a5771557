"""A newer megatron-core's Python tree, beside the installed one. Its wheels ask for Python 3.12; 3.11 runs it too."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

REQUIREMENT = "megatron-core==0.19.2"


def newer_megatron() -> Path:
    """Folder to put on the path, fetched by pip once for each environment. Skips the test if pip can't get it."""
    tree = Path(sys.prefix) / REQUIREMENT.replace("==", "-")
    if not tree.is_dir():
        with tempfile.TemporaryDirectory(dir=sys.prefix) as partial:
            fetched = subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                 "--python-version", "3.12", "--only-binary", ":all:", "--dest", partial, REQUIREMENT],
                capture_output=True,
                text=True,
            )  # fmt: skip
            if fetched.returncode:
                pytest.skip(f"pip can't get {REQUIREMENT}: {fetched.stderr.strip()[-300:]}")
            (wheel,) = Path(partial).glob("*.whl")
            zipfile.ZipFile(wheel).extractall(Path(partial) / "tree")
            (Path(partial) / "tree").rename(tree)
    return tree
