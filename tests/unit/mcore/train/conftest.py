from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_runs import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base checkpoint of a tiny Llama."""
    folder = tmp_path_factory.mktemp("train") / "base"
    make_base(folder, "llama")
    return folder
