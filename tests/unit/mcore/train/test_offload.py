"""An optimizer in the host's memory is refused where it can't be. What it does needs a GPU: tests/gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.errors import ConfigError
from mcore.train.offload import without_classes
from mcore.train.run import train
from tests.tiny_runs import tiny_run

OFFLOAD = {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True}


@pytest.mark.parametrize(("settings", "expected"), [
    ({"optimizer_cpu_offload": True}, "optimizer_cpu_offload needs use_precision_aware_optimizer"),
    ({"optimizer_offload_fraction": 0.5}, "optimizer_offload_fraction needs optimizer_cpu_offload"),
    ({**OFFLOAD, "exp_avg_dtype": "bfloat16"}, "exp_avg_dtype: bfloat16 can't be had with optimizer_cpu_offload"),
    ({**OFFLOAD, "exp_avg_sq_dtype": "bfloat16"}, "exp_avg_sq_dtype: bfloat16 can't be had"),
    ({**OFFLOAD, "optimizer_offload_fraction": 0.0}, "greater than 0"),
    ({**OFFLOAD, "optimizer_offload_fraction": 1.1}, "less than or equal to 1"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        TrainConfig.model_validate({"train_iters": 1} | settings)


def test_without_cuda_it_is_refused_before_anything_is_written(tmp_path: Path, base: Path) -> None:
    run = tiny_run(tmp_path, **OFFLOAD, torch_dtype="bfloat16")
    assert "optimizer_cpu_offload" in run.train.fields_for_transformer_engine
    with parallel_processes(Layout()), pytest.raises(ConfigError) as caught:
        train(run, base, tmp_path / "run")
    refused = {problem.subject for problem in caught.value.problems}
    assert refused == {"train.use_precision_aware_optimizer", "train.optimizer_cpu_offload"}
    assert not (tmp_path / "run").exists()


def test_checkpoints_hold_no_classes() -> None:
    state = {"optimizer": {"param_groups": [{"lr": 1e-3, "cpu_optimizer_cls": dict, "gpu_optimizer_cls": list}]}}
    without_classes(state)
    assert state == {"optimizer": {"param_groups": [{"lr": 1e-3}]}}
    without_classes(nothing := {"state": {}})
    assert nothing == {"state": {}}
