from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from configs.schema.train import TrainConfig
from mcore.data.dataset import TokenDataset
from mcore.data.template import Sample
from mcore.errors import ConfigError
from mcore.train.schedule import Schedule, lr_scheduler

PEAK, END, STEPS, WARMUP, WSD = 3e-4, 2e-5, 20, 5, 6


def samples(count: int) -> TokenDataset:
    return TokenDataset([Sample([1, 2], [False, True], f"row {i}") for i in range(count)])


def config(**fields: object) -> TrainConfig:
    return TrainConfig.model_validate({"train_iters": STEPS, "lr": PEAK, "min_lr": END, **fields})


def closed_formula(style: str, step: int, decay: int = STEPS, at_end: str = "") -> float:
    """Rate of step `step`, counted from 1, written down independently of megatron-core."""
    done = step - 1
    if done <= WARMUP:
        return PEAK * done / WARMUP
    if done > decay:
        return END
    share = (done - WARMUP) / (decay - WARMUP)
    if style == "inverse-square-root":
        return max(END, PEAK * math.sqrt(WARMUP / done))
    if style == "WSD":
        share = max(0, done - (decay - WSD)) / WSD
        left = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "minus_sqrt": 1 - math.sqrt(share)}
        return END + (PEAK - END) * (left | {"exponential": 2 * 0.5**share - 1})[at_end]
    if style == "linear":
        return PEAK - (PEAK - END) * share
    if style == "cosine":
        return END + (PEAK - END) * (1 + math.cos(math.pi * share)) / 2
    return PEAK


def rates(settings: TrainConfig) -> list[float]:
    groups = [{"max_lr": PEAK, "min_lr": END, "wd_mult": 1.0, "default_config": True}]
    scheduler = lr_scheduler(settings, Schedule.from_config(settings, samples(1)), SimpleNamespace(param_groups=groups))
    found = []
    for _ in range(STEPS):
        found.append(groups[0]["lr"])
        scheduler.step(1)
    return found


@pytest.mark.parametrize("style", ["cosine", "linear", "inverse-square-root"])
@pytest.mark.parametrize("decay", [12, STEPS, 3 * STEPS])
def test_a_decay_may_end_before_or_behind_the_run(style: str, decay: int) -> None:
    settings = config(lr_decay_style=style, lr_decay_iters=decay, lr_warmup_iters=WARMUP)
    expected = [closed_formula(style, step, decay) for step in range(1, STEPS + 1)]
    assert rates(settings) == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert (expected[-1] == END) == (decay == 12)


@pytest.mark.parametrize("at_end", ["exponential", "linear", "cosine", "minus_sqrt"])
@pytest.mark.parametrize("decay", [None, 15])
def test_warm_up_stay_and_decay(at_end: str, decay: int | None) -> None:
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_style": at_end, "lr_wsd_decay_iters": WSD, "lr_decay_iters": decay}
    found = rates(config(lr_warmup_iters=WARMUP, **wsd))
    expected = [closed_formula("WSD", step, decay or STEPS, at_end) for step in range(1, STEPS + 1)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert found.count(PEAK) == (decay or STEPS) - WSD - WARMUP + 1


def test_a_warm_up_fraction_is_of_the_decay() -> None:
    settings = config(lr_warmup_fraction=0.25, lr_decay_iters=12)
    assert Schedule.from_config(settings, samples(1)) == Schedule(STEPS, 3)


def test_what_does_not_fit_into_the_run_is_told_when_its_length_is_known() -> None:
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "lr_warmup_iters": 1}
    settings = config(train_iters=None, num_train_epochs=1.0, global_batch_size=8, **wsd)
    assert Schedule.from_config(settings, samples(32)) == Schedule(4, 1)
    with pytest.raises(ConfigError) as caught:
        Schedule.from_config(settings, samples(24))
    assert [problem.subject for problem in caught.value.problems] == ["train.lr_wsd_decay_iters"]


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_rates_follow_the_closed_formula(style: str) -> None:
    settings = config(lr_decay_style=style, lr_warmup_iters=WARMUP, weight_decay=0.1)
    groups = [
        {"max_lr": PEAK, "min_lr": END, "wd_mult": 1.0, "default_config": True},
        {"max_lr": PEAK, "min_lr": END, "wd_mult": 0.0, "default_config": True},
    ]
    scheduler = lr_scheduler(settings, Schedule.from_config(settings, samples(1)), SimpleNamespace(param_groups=groups))
    for step in range(1, STEPS + 1):
        for group in groups:
            assert group["lr"] == pytest.approx(closed_formula(style, step), rel=1e-12, abs=1e-18)
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        scheduler.step(1)


@pytest.mark.parametrize(
    ("epochs", "num_samples", "batch", "steps"), [(1.0, 32, 8, 4), (1.0, 33, 8, 5), (3.0, 22, 8, 9), (0.1, 30, 8, 1)]
)
def test_epochs_are_rounded_up_to_whole_steps(epochs: float, num_samples: int, batch: int, steps: int) -> None:
    settings = config(train_iters=None, num_train_epochs=epochs, global_batch_size=batch)
    assert Schedule.from_config(settings, samples(num_samples)) == Schedule(steps, 0)


def test_a_warm_up_fraction_counts_all_steps() -> None:
    assert Schedule.from_config(config(lr_warmup_fraction=0.25), samples(1)) == Schedule(STEPS, 5)


@pytest.mark.parametrize("field", [{"lr_warmup_iters": 3}, {"lr_warmup_fraction": 1.0}])
def test_a_warm_up_that_turns_out_as_long_as_the_run_is_refused(field: dict[str, float]) -> None:
    settings = config(train_iters=None, num_train_epochs=1.0, global_batch_size=8, **field)
    with pytest.raises(ConfigError) as caught:
        Schedule.from_config(settings, samples(24))
    assert [problem.subject for problem in caught.value.problems] == [f"train.{next(iter(field))}"]
