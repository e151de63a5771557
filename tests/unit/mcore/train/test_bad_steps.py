"""Steps that must not be learnt from: rows whose gradients really are not finite, and a row whose loss is a spike."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from configs.schema.data import DataConfig
from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.errors import StoppedError, TrainingError
from mcore.metrics import read_metrics
from mcore.select import iteration_dir, iterations_in
from mcore.train.bad_steps import what_is_wrong
from mcore.train.run import train
from mcore.train.stop import StopRequest
from tests.tiny_runs import make_base, saved_tensors, tiny_run

STEPS = 14
POISON = "~"
"""A character whose embedding is so large that its square, in a norm, is infinite: the gradient is NaN."""
TIMES = ("time", "step_time_s", "tokens_per_s", "mfu", "memory_gib")


def poisoned(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[4 + ord(POISON) - 32] = 3e38


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad_steps")
    make_base(folder / "llama", "llama", poisoned)
    make_base(folder / "deepseek_v3", "deepseek_v3", poisoned)
    return folder


def rows_with(folder: Path, bad: Iterable[int], text: str) -> Path:
    """Rows of one kind in order, two a step, but in the named steps, counted from 1, one of them is `text`."""
    path = folder / f"{'-'.join(map(str, bad))}-{ord(text[0])}.jsonl"
    places = {2 * step - 1 for step in bad}
    with path.open("w") as file:
        for place in range(2 * STEPS + 12):
            answer = text if place in places else "the small red model answers with few words"
            file.write(json.dumps({"messages": [
                {"role": "user", "content": "ask"}, {"role": "assistant", "content": answer}
            ]}) + "\n")  # fmt: skip
    return path


class StopEvery(StopRequest):
    """Asks to stop at every so many steps, which is how often it is looked at."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.seen = steps, 0

    @property
    def received(self) -> bool:
        self.seen += 1
        return self.seen % self.steps == 0

    @received.setter
    def received(self, value: bool) -> None:
        pass


def run_on(
    folder: Path, rows: Path, name: str, *, base: str = "llama", steps_a_start: int = 99, **settings: Any
) -> Path:
    """Train on these rows; stopped behind so many steps of each start, and started again as often as it takes."""
    settings = {"global_batch_size": 2, "micro_batch_size": 1, "train_iters": STEPS, "save_steps": 4} | settings
    run = tiny_run(folder, **settings)
    data = DataConfig(dataset=(str(rows),), max_length=128, dataset_shuffle=False)
    run = run.model_copy(update={"data": data})
    with parallel_processes(Layout()):
        while True:
            try:
                train(run, folder / base, folder / name, StopEvery(steps_a_start))
            except StoppedError:
                continue
            return folder / name


def records(output: Path) -> list[dict[str, Any]]:
    found = read_metrics(output / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in found]


def same(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    assert iterations_in(one) == iterations_in(other)
    for iteration in iterations_in(one):
        expected, found = (saved_tensors(iteration_dir(output, iteration)) for output in (one, other))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_without_a_policy_a_row_with_such_a_gradient_ends_the_run_and_is_named(folder: Path) -> None:
    rows = rows_with(folder, [6], POISON)
    with pytest.raises(TrainingError, match=r"iteration 6: loss .*gradient norm nan") as caught:
        run_on(folder, rows, "stop", async_save=True)
    assert f"({rows}:12)" in str(caught.value)
    assert iterations_in(folder / "stop") == [4]


@pytest.mark.parametrize("base", ["llama", "deepseek_v3"])
def test_a_skipped_step_is_as_if_it_had_not_been(folder: Path, base: str) -> None:
    """Weights and moments behind it are those before it, and it is recorded."""
    biases = {"moe_router_bias_update_rate": 0.01} if base == "deepseek_v3" else {}
    settings = {"base": base, "bad_step_policy": "skip", "save_steps": 1, "train_iters": 7, **biases}
    output = run_on(folder, rows_with(folder, [6], POISON), f"skip-{base}", **settings)
    before, behind, later = (saved_tensors(iteration_dir(output, iteration)) for iteration in (5, 6, 7))
    assert all(torch.equal(behind[key], tensor) for key, tensor in before.items())
    assert not all(torch.equal(later[key], tensor) for key, tensor in before.items())
    assert [record["iteration"] for record in records(output) if "loss" in record] == [1, 2, 3, 4, 5, 7]
    (skipped,) = (record for record in records(output) if "skipped" in record)
    assert skipped["iteration"] == 6 and "gradient norm nan" in skipped["skipped"]
    assert json.loads((output / "metrics.json").read_text())["bad_steps"] == 1


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("skip", {}),
        pytest.param("rollback", {"async_save": True}, marks=pytest.mark.long),
        pytest.param("rollback", {"tuner_type": "lora", "lora_rank": 4}, marks=pytest.mark.long),
    ],
)
def test_a_run_that_is_stopped_again_and_again_decides_as_before(
    folder: Path, policy: str, settings: dict[str, Any]
) -> None:
    rows = rows_with(folder, [6, 7, 12], POISON)
    name = f"{policy}-{'-'.join(settings) or 'full'}"
    settings = {"bad_step_policy": policy, "save_total_limit": 2, **settings}
    straight = run_on(folder, rows, f"{name}-straight", **settings)
    stopped = run_on(folder, rows, f"{name}-stopped", **settings, steps_a_start=3)
    same(straight, stopped)
    skipped = [record for record in records(straight) if "skipped" in record]
    if policy == "skip":
        assert [record["iteration"] for record in skipped] == [6, 7, 12]
    else:
        # Steps 5 and 6 are undone, and the next batch is the bad 7th. The 8th is that of step 5, the 12th of step 9.
        figures = ("iteration", "bad_iteration", "passed_over_samples", "rollbacks")
        assert [tuple(record[figure] for figure in figures) for record in skipped] == [(5, 5, 6, 2), (9, 9, 2, 3)]


def test_too_many_bad_steps_in_a_row_end_the_run(folder: Path) -> None:
    rows = rows_with(folder, [2, 4, 5, 7, 8, 9], POISON)
    with pytest.raises(TrainingError, match=r"iteration 9: .*\(2 bad steps in a row before\)"):
        run_on(folder, rows, "row", bad_step_policy="skip", max_bad_steps=2)


def test_a_rate_that_ruins_the_weights_ends_the_run_whatever_the_policy(folder: Path) -> None:
    rows = rows_with(folder, [], "x")
    ruin = {"lr": 1e30, "lr_warmup_iters": 0, "save_steps": 1}
    with pytest.raises(TrainingError, match=r"iteration 5: .*\(3 bad steps in a row before\)"):
        run_on(folder, rows, "ruined-skip", bad_step_policy="skip", **ruin)
    with pytest.raises(TrainingError, match=r"iteration 2: .*\(3 bad steps led back before\)"):
        run_on(folder, rows, "ruined-rollback", bad_step_policy="rollback", **ruin)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(folder: Path) -> None:
    with pytest.raises(TrainingError, match=r"iteration 3: (.|\n)*a checkpoint to go back to"):
        run_on(folder, rows_with(folder, [3], POISON), "too-early", bad_step_policy="rollback")


def test_a_row_unlike_all_others_is_a_spike(folder: Path) -> None:
    rows = rows_with(folder, [12], "#@!%&*(#@!%&*(#@!%&*(#@!%&*(#@!%&*(#@!%&*(")
    fast = {"lr": 1e-2, "lr_warmup_iters": 1}
    learnt = run_on(folder, rows, "spike-learnt", **fast)
    losses = {record["iteration"]: record["loss"] for record in records(learnt) if "loss" in record}
    assert losses[12] > 1.5 * sorted(losses[step] for step in range(1, 12))[5]
    settings = {**fast, "bad_step_policy": "skip", "loss_spike_factor": 1.5}
    straight = run_on(folder, rows, "spike-straight", **settings)
    same(straight, run_on(folder, rows, "spike-stopped", **settings, steps_a_start=5))
    (skipped,) = (record for record in records(straight) if "skipped" in record)
    assert skipped["iteration"] == 12 and "1.5 times the usual" in skipped["skipped"]


def test_what_is_wrong_with_a_step() -> None:
    calm = [2.0] * 8
    assert not what_is_wrong(2.0, 1.0)
    assert not what_is_wrong(100.0, 1.0, recent_losses=calm)
    assert not what_is_wrong(4.0, 1.0, recent_losses=calm, spike_factor=2.0)
    assert not what_is_wrong(100.0, 1.0, recent_losses=calm[:7], spike_factor=2.0)
    assert what_is_wrong(4.1, 1.0, recent_losses=calm, spike_factor=2.0)
    assert what_is_wrong(100.0, 1.0, recent_losses=[*calm, 99.0, 99.0], spike_factor=2.0)
    for number in (float("nan"), float("inf")):
        assert what_is_wrong(number, 1.0) and what_is_wrong(2.0, number)
