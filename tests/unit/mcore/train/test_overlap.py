"""Overlap in one process: sums begin at a step's last micro-batch only, and what reads weights has all of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from pydantic import ValidationError

from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.metrics import read_metrics
from mcore.train import model
from mcore.train.base import open_base
from mcore.train.model import build_training
from mcore.train.run import train
from mcore.train.schedule import Schedule
from tests.tiny_runs import recorded, saved_tensors, tiny_run

BOTH = {"overlap_grad_reduce": True, "overlap_param_gather": True}
STEPS = 8


@pytest.fixture(autouse=True)
def many_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = partial(DistributedDataParallelConfig, bucket_size=1000)
    monkeypatch.setattr(model, "DistributedDataParallelConfig", buckets)


def run_in(folder: Path, base: Path, name: str, **settings: Any) -> Path:
    common = {"train_iters": STEPS, "save_steps": 4, "eval_steps": 2, "micro_batch_size": 1}
    with parallel_processes(Layout()):
        train(tiny_run(folder, **(common | settings)), base, folder / name)
    return folder / name


@pytest.mark.parametrize("settings", [{}, {"packing": False}, {"async_save": True, "torch_dtype": "bfloat16"}])
def test_one_process_learns_the_same_to_the_bit(tmp_path: Path, base: Path, settings: dict[str, Any]) -> None:
    """Packed steps have more or fewer micro-batches than the first one, which is what megatron-core counts by."""
    runs = [run_in(tmp_path, base, f"{len(how)}", **settings, **how) for how in ({}, BOTH)]
    for figure in ("loss", "validation_loss", "grad_norm"):
        plain, other = (recorded(read_metrics(run / "metrics.jsonl"), figure) for run in runs)
        assert other == plain and plain
    expected, found = (saved_tensors(run / f"iter_{STEPS:07d}") for run in runs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_megatron_loses_count_where_nobody_says_which_micro_batch_is_the_last(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself it waits for as many micro-batches as the first step had, and a packed step has fewer or more."""

    def finalize_only(modules: Any, chunks: Any) -> None:
        for module in modules:
            module.config.finalize_model_grads_func = finalize_model_grads

    monkeypatch.setattr(model, "overlap", finalize_only)
    with pytest.raises(AssertionError, match="Communication call has not been issued"):
        run_in(tmp_path, base, "left", overlap_grad_reduce=True)


def test_weights_are_gathered_beside_forward_from_the_first_update_on(tmp_path: Path, base: Path) -> None:
    run = tiny_run(tmp_path, **BOTH)
    with parallel_processes(Layout()):
        training = build_training(run.train, Schedule(STEPS, 3), open_base(base, run), Layout(), has_weights=True)
        (chunk,) = training.chunks

        def is_on() -> bool:
            return bool(chunk.remove_forward_pre_hook_handles)

        assert not is_on()
        training.gathering.begin()
        assert is_on()
        with training.gathering.whole():
            assert not is_on()
            with training.gathering.whole():
                assert not is_on()
            assert not is_on()
        assert is_on()
        with pytest.raises(RuntimeError), training.gathering.whole():
            raise RuntimeError("validation failed")
        assert is_on()


@pytest.mark.parametrize(("settings", "expected"), [
    ({"overlap_param_gather": True}, "overlap_param_gather needs overlap_grad_reduce"),
    ({**BOTH, "use_distributed_optimizer": False}, "overlap_param_gather needs use_distributed_optimizer"),
])  # fmt: skip
def test_what_overlap_needs_is_refused_before_anything_starts(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        TrainConfig.model_validate({"train_iters": 1} | settings)
