"""Single stages by hand, one behind the other, on the shared model: real torch, megatron-core and vLLM."""

import json

import pytest
import yaml

from tests.flows.workspace import VLLM_PYTHON, raw_run
from tests.unit.flows.command_line import mcore_flows


@pytest.fixture(scope="module")
def here(workspace, tmp_path_factory):
    """A folder with links to what the workspace has, so that whatever else appears was made here."""
    folder = tmp_path_factory.mktemp("by_hand")
    for name in ("model", "rows.jsonl", "suite.yaml"):
        (folder / name).symlink_to(workspace.folder / name)
    run = raw_run(train={"train_iters": 2, "save_steps": 1, "lr_warmup_iters": 1}, evaluate=None)
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.long
def test_the_line_by_hand(here):
    # Training brings the conversion along; in one process here, the pipeline's own tests do it in two.
    slot = ["--set", "launch.device_slots=1", "--set", f"launch.device_locks={here}/locks"]
    done = mcore_flows("train", "run.yaml", *slot, cwd=here)
    assert done.returncode == 2 and "at most the slots that launch.device_slots has (1), found 2" in done.stderr
    done = mcore_flows("train", "run.yaml", "--set", "launch.nproc_per_node=1", *slot, cwd=here)
    assert done.returncode == 0 and "on slot 0\n" in done.stderr, done.stderr
    assert {"iter_0000001", "iter_0000002", "hf", "metrics.jsonl"} <= names(here / "output" / "tiny")
    base = here / "output" / "tiny-base"
    assert {"release", "hf", "latest_checkpointed_iteration.txt"} <= names(base)

    # Another learning rate is another run. Both processes find out; it is told once.
    done = mcore_flows("train", "run.yaml", "--set", "train.lr=1e-4", cwd=here)
    assert done.returncode == 2 and done.stderr.count("the output folder belongs to another run") == 1
    assert "Traceback" not in done.stderr  # nor torchrun's account of what its processes did

    old = (base / "release").stat().st_ino
    done = mcore_flows("convert", "--model", "model", "--output", base, "--overwrite", cwd=here)
    assert done.returncode == 0 and (base / "release").stat().st_ino != old, done.stderr

    # The verdict is printed, and nothing is kept unless asked for.
    before = names(here)
    done = mcore_flows("verify", "--hf", "model", "--mcore", base, "--max-relative-error", "1e-12", cwd=here)
    assert done.returncode == 3 and done.stdout.startswith("# Verification: FAILED") and "## Parts" in done.stdout
    assert done.stderr.count("PrecisionError") == 1 and "Traceback" not in done.stderr
    assert names(here) == before
    done = mcore_flows("verify", "--hf", "model", "--mcore", base, "--output", "proof", cwd=here)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "proof/report.md"
    assert "## Parts" not in done.stdout and "## Parts" in (here / "proof" / "report.md").read_text()
    assert json.loads((here / "proof" / "report.json").read_text())["passed"] is True

    done = mcore_flows("export", "--checkpoint", "output/tiny", "--iteration", "7", "--output", "tuned", cwd=here)
    assert done.returncode == 2 and "expected one of 1, 2, found 7" in done.stderr
    done = mcore_flows("export", "--checkpoint", "output/tiny", "--iteration", "1", "--output", "tuned", cwd=here)
    assert done.returncode == 0 and {"model.safetensors", "config.json", "chat_template.jinja"} <= names(here / "tuned")


@pytest.mark.vllm
def test_a_model_is_asked_by_hand(here):
    before = names(here)
    options = ["--suite", "suite.yaml", "--model-name", "tiny-bot", "--max-tokens", "4", "--max-model-len", "64"]
    done = mcore_flows("evaluate", "--model", "model", *options, "--python", VLLM_PYTHON, cwd=here)
    assert done.returncode == 0, done.stderr
    assert "Who are you?" in done.stdout and "✗" in done.stdout and "identity: 0 of 1 passed" in done.stderr
    assert names(here) == before
