"""One workspace for all fault tests, and what undisturbed runs in it come to, made once a session."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.disturbed import Disturbed
from tests.flows.workspace import make_workspace

Undisturbed = Callable[[dict[str, Any]], Disturbed]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and rows, in which runs can be started."""
    folder = tmp_path_factory.mktemp("faults")
    make_workspace(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(workspace: Path, prefect_api_url: str) -> Undisturbed:
    """Gives the run of a run file that nobody disturbed."""
    made: dict[str, Disturbed] = {}

    def of(run: dict[str, Any]) -> Disturbed:
        name = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:12]
        if name not in made:
            whole = Disturbed(workspace, f"undisturbed-{name}", run, api_url=prefect_api_url)
            assert whole.start().wait(500) == 0, whole.log()
            made[name] = whole
        return made[name]

    return of
