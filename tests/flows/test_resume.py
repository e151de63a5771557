"""`mcore-flows resume --from`: a stage and all behind it are made again, and nothing is lost meanwhile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcore.artifacts import Manifest, Store
from mcore.runs import current
from tests.flows.workspace import raw_run

COMMAND = Path(sys.executable).with_name("mcore-flows")


@pytest.mark.long
def test_from_a_stage_on_everything_is_made_again_and_what_was_there_stays(workspace, finished):
    run = raw_run(evaluate=None) | {"name": "resumed"}
    former = {outcome["name"]: outcome["artifact"] for outcome in workspace.run(run)["outcomes"]}
    before = workspace.weight_files()
    link = workspace.store / "runs" / "resumed" / "model"
    assert str(link.resolve()) == former["export"]["path"]

    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment["PREFECT_HOME"] = str(workspace.folder / "prefect")

    def resume(*options: str) -> dict[str, bool]:
        """Stages, and whether they were reused."""
        command = [COMMAND, "resume", "resumed", *options]
        done = subprocess.run(command, cwd=workspace.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        record = current(Store(workspace.store), "resumed")
        assert record is not None
        return {name: outcome["cached"] for name, outcome in record.outcomes.items()}

    expected = {"prepare": True, "convert": True, "verify_convert": True, "train": True, "select": True}
    assert resume("--from", "export") == expected | {"export": False, "verify_export": False}
    after = workspace.weight_files()
    assert {name: after.get(name) for name in before} == before, "something that was there was touched"
    new = link.resolve()
    assert str(new) != former["export"]["path"]
    assert Manifest.read(new).content == former["export"]["content"]  # the same bytes, in a folder of its own
    assert resume() == expected | {"export": True, "verify_export": True}  # it goes on with what it made again
    assert link.resolve() == new
    again = json.loads((workspace.store / "runs" / "resumed" / "run.json").read_text())["config"]["launch"]["again"]
    assert set(again) == {"export"}
