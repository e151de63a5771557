"""`mcore-flows layouts` as people meet it: a table, JSON whose fields a run takes, and a refusal where nothing fits."""

import json
from pathlib import Path
from typing import Any

from tests.unit.flows.command_line import mcore_flows


def test_layouts_are_ranked_and_a_run_takes_them(raw: dict[str, Any]) -> None:
    Path("run.yaml").write_text(json.dumps(raw))  # which is YAML
    here = Path.cwd()
    done = mcore_flows("layouts", "run.yaml", "--gpus", "2", "--top", "3", cwd=here)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["TP", "PP", "VPP"] and len(lines) == 4
    first, *_ = json.loads(mcore_flows("layouts", "run.yaml", "--gpus", "2", "--json", cwd=here).stdout)
    assert f"{first['mfu']:.1%}" in lines[1]
    assert first["seconds"]["total"] == sum(of for name, of in first["seconds"].items() if name != "total")
    Path("chosen.yaml").write_text(
        json.dumps(
            raw
            | {"train": raw.get("train", {}) | first["train"], "launch": raw.get("launch", {}) | {"nproc_per_node": 2}}
        )
    )
    assert mcore_flows("plan", "chosen.yaml", cwd=here).returncode == 0
    none = mcore_flows("layouts", "run.yaml", "--memory-gib", "0.5", cwd=here)
    assert none.returncode == 2 and "no layout fits" in none.stderr
