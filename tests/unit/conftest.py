from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.tasks.model_folders import write_workspace


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of a small model, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return write_workspace(tmp_path)
