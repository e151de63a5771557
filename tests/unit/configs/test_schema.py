"""The run model: its fields are documented, and what does not fit together is refused."""

import math
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from configs.schema.base import StrictModel
from configs.schema.run import RunConfig
from configs.schema.suite import Suite

RUN: dict[str, Any] = {
    "name": "test",
    "model": {"source": "model"},
    "data": {"dataset": ["rows.jsonl"]},
    "train": {"train_iters": 3},
}


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A model and all models in it."""
    found = {model}
    pending = [field.annotation for field in model.model_fields.values()]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found |= models(annotation)
        pending += get_args(annotation)
    return found


ALL_MODELS = sorted(models(RunConfig) | models(Suite), key=lambda model: model.__name__)
ALL_FIELDS = [(model, name) for model in ALL_MODELS for name in model.model_fields]


def test_the_groups_are_found() -> None:
    names = {model.__name__ for model in ALL_MODELS}
    assert {"RunConfig", "ModelConfig", "DataConfig", "TrainConfig", "LaunchConfig", "EvaluateConfig"} <= names
    assert len(ALL_FIELDS) > 80


@pytest.mark.parametrize(("model", "name"), ALL_FIELDS, ids=[f"{model.__name__}.{name}" for model, name in ALL_FIELDS])
def test_every_field_is_described(model: type[BaseModel], name: str) -> None:
    description = model.model_fields[name].description
    assert description and description.rstrip().endswith((".", ")")), f"{model.__name__}.{name} has no sentence"


@pytest.mark.parametrize("model", ALL_MODELS, ids=lambda model: model.__name__)
def test_every_model_is_strict(model: type[BaseModel]) -> None:
    assert issubclass(model, StrictModel) and model.__doc__
    with pytest.raises(ValidationError) as error:
        model.model_validate({"no_such_field": 1})
    assert any(finding["type"] == "extra_forbidden" for finding in error.value.errors())


def test_a_run_is_frozen_and_survives_json() -> None:
    run = RunConfig.model_validate(RUN)
    with pytest.raises(ValidationError):
        run.name = "other"  # type: ignore[misc]
    assert RunConfig.model_validate(run.model_dump(mode="json")) == run
    assert RunConfig.model_validate_json(run.model_dump_json()) == run


def problems(**groups: dict[str, Any]) -> str:
    raw = {name: RUN.get(name, {}) | groups.get(name, {}) for name in {*groups, *RUN} - {"name"}} | {"name": "test"}
    try:
        RunConfig.model_validate(raw)
    except ValidationError as exc:
        return str(exc)
    return ""


def test_the_base_of_these_tests_is_right() -> None:
    assert problems() == ""


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"train": {"train_iters": None}}, "exactly one of train_iters and num_train_epochs"),
        ({"train": {"num_train_epochs": 1}}, "exactly one of train_iters and num_train_epochs"),
        ({"train": {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3}}, "only one of lr_warmup"),
        ({"train": {"lr_warmup_iters": 3}}, "the warm-up (3 steps) must be shorter than train_iters (3)"),
        ({"train": {"lr_warmup_fraction": 0.9}}, "the warm-up (3 steps) must be shorter than train_iters (3)"),
        ({"train": {"lr": 1e-5, "min_lr": 1e-4}}, "min_lr (0.0001) must not exceed lr"),
        ({"train": {"lr_decay_iters": 2, "lr_warmup_iters": 2}}, "must be shorter than lr_decay_iters (2)"),
        ({"train": {"lr_decay_iters": 2, "lr_decay_style": "constant"}}, "no effect with lr_decay_style: constant"),
        ({"train": {"lr_decay_style": "WSD"}}, "WSD needs lr_wsd_decay_iters"),
        ({"train": {"lr_wsd_decay_iters": 2}}, "lr_wsd_decay_iters belongs to lr_decay_style: WSD"),
        ({"train": {"lr_wsd_decay_style": "cosine"}}, "lr_wsd_decay_style belongs to lr_decay_style: WSD"),
        (
            {"train": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "lr_warmup_iters": 1}},
            "lr_wsd_decay_iters (3) and the warm-up (1) exceed train_iters (3)",
        ),
        ({"train": {"sequence_parallel": True}}, "sequence_parallel needs"),
        ({"train": {"recompute_granularity": "full"}}, "needs recompute_method and recompute_num_layers"),
        ({"train": {"recompute_method": "block"}}, "belong to recompute_granularity: full"),
        ({"train": {"recompute_modules": ["mlp"]}}, "recompute_modules belongs to recompute_granularity: selective"),
        ({"train": {"cross_entropy_chunk_tokens": 0}}, "greater than or equal to 1"),
        ({"train": {"backend": "torch", "gradient_accumulation_fusion": True}}, "gradient_accumulation_fusion needs"),
        ({"train": {"main_grads_dtype": "bfloat16"}}, "main_grads_dtype: bfloat16 needs use_precision_aware"),
        ({"train": {"exp_avg_dtype": "bfloat16"}}, "exp_avg_dtype: bfloat16 needs use_precision_aware"),
        ({"train": {"exp_avg_sq_dtype": "bfloat16"}}, "exp_avg_sq_dtype: bfloat16 needs use_precision_aware"),
        (
            {"train": {"use_precision_aware_optimizer": True, "use_distributed_optimizer": False}},
            "use_precision_aware_optimizer needs use_distributed_optimizer",
        ),
        (
            {"train": {"use_precision_aware_optimizer": True, "torch_dtype": "float32"}},
            "use_precision_aware_optimizer needs torch_dtype: bfloat16",
        ),
        ({"train": {"save_total_limit": 1}}, "greater than or equal to 2"),
        ({"train": {"lr": math.inf}}, "finite number"),
        ({"verify": {"max_relative_error": math.inf}}, "finite number"),
        ({"verify": {"max_relative_error": math.nan}}, "finite number"),
        ({"data": {"split_dataset_ratio": 1.0}}, "less than 1"),
        ({"select": {"strategy": "iteration"}}, "iteration is given exactly when"),
        ({"select": {"iteration": 3}}, "iteration is given exactly when"),
        ({"launch": {"nproc_per_node": 3}, "train": {"tensor_model_parallel_size": 2}}, "multiple of tensor_model"),
        ({"launch": {"nproc_per_node": 3}}, "train.global_batch_size (16) must be a multiple of"),
        ({"train": {"micro_batch_size": 3}}, "(3 x 1 = 3)"),
    ],
)
def test_what_does_not_fit_is_refused(groups: dict[str, dict[str, Any]], message: str) -> None:
    assert message in problems(**groups)


def test_all_problems_of_a_group_come_together() -> None:
    message = problems(train={"train_iters": None, "min_lr": 1.0, "sequence_parallel": True})
    assert all(part in message for part in ("exactly one of", "must not exceed", "sequence_parallel needs"))


def test_a_layout_that_does_not_fit_hides_no_batch_that_never_fits() -> None:
    train = {"tensor_model_parallel_size": 2, "global_batch_size": 7, "micro_batch_size": 2}
    message = problems(launch={"nproc_per_node": 3}, train=train)
    assert "launch.nproc_per_node (3) must be a multiple" in message
    assert "train.global_batch_size (7) must be a multiple of micro_batch_size (2)" in message
    assert "global_batch_size" not in problems(launch={"nproc_per_node": 3}, train=train | {"micro_batch_size": 7})


def test_data_parallel_size() -> None:
    raw = RUN | {
        "launch": {"nproc_per_node": 8},
        "train": {"train_iters": 1, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    }
    run = RunConfig.model_validate(raw)
    assert (run.train.model_parallel_size, run.data_parallel_size) == (4, 2)
