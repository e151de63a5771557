"""What a run's folder must be is looked at before anything is started, and told with all else that is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.bridge.hf_config import read_hf_config
from mcore.select import iteration_dir
from mcore.train.output import checkpoint_bytes, output_problems
from mcore.train.run import train
from tests.parallel.launch import REPOSITORY
from tests.tiny_models import PADDED_VOCAB_SIZE
from tests.tiny_runs import make_base, tiny_run, write_rows, write_run


def findings(output: Path, hf_config: dict[str, Any], num_bytes: int = 0, **settings: Any) -> list[str]:
    config = TrainConfig.model_validate({"train_iters": 12} | settings)
    problems = output_problems(output, config, hf_config, train_iters=config.train_iters, num_bytes=num_bytes)
    return list(map(str, problems))


@pytest.mark.parametrize(
    "options", [{}, {"torch_dtype": "bfloat16"}, {"use_distributed_optimizer": False}], ids=["fp32", "bf16", "whole"]
)
def test_a_checkpoint_takes_as_many_bytes_as_predicted(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    run = tiny_run(tmp_path, train_iters=1, lr_warmup_iters=0, **options)
    with parallel_processes(Layout()):
        train(run, base, tmp_path / "run")
    config = read_hf_config(base / "hf")
    predicted = checkpoint_bytes(run.train, config, make_vocab_size_divisible_by=PADDED_VOCAB_SIZE)
    shards = iteration_dir(tmp_path / "run", 1).glob("*.distcp")
    written = sum(path.stat().st_size for path in shards)
    # Each of the tensors has a zip archive of its own around it, which is much beside tensors as small as these.
    assert predicted < written < predicted + 2000 * 4 * 60


def test_room_is_needed_for_all_checkpoints_that_are_there_at_once(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    each = free // 5
    steps = {"train_iters": 12, "save_steps": 2}
    (told,) = findings(tmp_path / "run", {}, each, **steps)
    assert "room for 6 checkpoints" in told and str(tmp_path) in told
    assert not findings(tmp_path / "run", {}, each, **steps, save_total_limit=3)
    assert findings(tmp_path / "run", {}, each, **steps, save_total_limit=5)
    for iteration in (2, 4, 6):  # they are there already
        iteration_dir(tmp_path / "run", iteration).mkdir(parents=True)
    assert not findings(tmp_path / "run", {}, each, **steps)


def test_a_folder_that_can_t_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "found a file" in findings(tmp_path / "file" / "run", {})[0]
    read_only = Path("/sys")
    if os.access(read_only, os.W_OK):
        pytest.skip("this machine has no folder that cannot be written to")
    assert "no permission" in findings(read_only / "run", {})[0]


def test_everything_that_is_wrong_is_told_at_once_and_nothing_is_written(tmp_path: Path, base: Path) -> None:
    """By the command itself: a field for experts, too few rows, too little room, another model's run."""
    make_base(tmp_path / "other", "qwen2")
    with parallel_processes(Layout()):
        train(tiny_run(tmp_path, train_iters=1, lr_warmup_iters=0), tmp_path / "other", tmp_path / "run")
    write_rows(tmp_path / "train.jsonl", 5, seed=1)
    settings = {"global_batch_size": 10, "train_iters": 10**10, "save_steps": 1, "moe_router_bias_update_rate": 0.1}
    run = tiny_run(tmp_path, **settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    command = [sys.executable, "-W", "ignore", "-m", "mcore.train", write_run(tmp_path / "run.yaml", run)]
    done = subprocess.run(
        [*command, "--base", base, "--output", tmp_path / "run"],
        capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    for told in (
        "train.moe_router_bias_update_rate: expected",
        "data.dataset: expected at least train.global_batch_size samples (10), found 5 samples",
        "room for 10000000000 checkpoints",
        "architectures: expected ['LlamaForCausalLM'], as the model has, found ['Qwen2ForCausalLM']",
    ):
        assert told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert json.loads((tmp_path / "run" / "hf" / "config.json").read_text())["model_type"] == "qwen2"
