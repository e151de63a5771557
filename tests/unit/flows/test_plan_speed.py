"""`plan` over a store with a thousand artifacts, as a year of runs leaves it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mcore.artifacts import MANIFEST, Manifest, Store, digest_of
from tasks.graph import StagePlan
from tests.unit.flows.command_line import COMMAND
from tests.unit.flows.made_runs import checked_run, finish

NUM_ARTIFACTS, NUM_FILES = 1000, 8
LIMIT_S = 2.0


def write_artifacts(store: Store, plans: Sequence[StagePlan]) -> None:
    """Artifacts that differ from the plan's in one setting. Not by `commit`, which takes minutes for so many."""
    made = []
    for number in range(NUM_ARTIFACTS):
        plan = plans[number % len(plans)]
        ingredients = {**plan.ingredients, "config": {**plan.ingredients.get("config", {}), "train.seed": number}}
        folder = store.path(plan.kind, digest_of(ingredients))
        folder.mkdir(parents=True)
        for file in range(NUM_FILES):
            (folder / f"file-{file}").write_text(f"{number} {file}\n" * 20)
        made.append((plan, ingredients, folder))
    for number, (plan, ingredients, folder) in enumerate(made):
        files = {
            path.name: {"size": path.stat().st_size, "sha256": store.digests.digest(path)} for path in folder.iterdir()
        }
        manifest = Manifest(
            kind=plan.kind, key=folder.name, files=files, inputs=plan.inputs, input_content={}, ingredients=ingredients,
            metrics={"final_loss": 1.0 + number}, versions={"torch": "2.13.0"}, duration_s=60.0,
            created=f"2026-01-01T00:{number // 60 % 60:02d}:{number % 60:02d}.000000+00:00",
        )  # fmt: skip
        (folder / MANIFEST).write_text(manifest.to_json())
    store.digests.save()


@pytest.mark.long
def test_a_plan_takes_less_than_two_seconds(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["evaluate"] = None  # or vLLM is asked for its version, once, which is not the store's matter
    checked = checked_run(raw)
    finish(checked)
    store = Store(checked.run.launch.store)
    write_artifacts(store, checked.stages)
    assert sum(1 for _ in store.manifests()) == NUM_ARTIFACTS + len(checked.stages)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(raw))
    for options, last in (([], "0 of"), (["--set", "train.lr=1.0e-6"], "of")):
        # Of the process itself, so that what else the machine does counts for nothing; it waits for nothing.
        with subprocess.Popen(
            [COMMAND, "plan", run_file, *options], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            told = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0 and last in told.splitlines()[-1], told
        assert used.ru_utime + used.ru_stime < LIMIT_S, used
