from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.schema.train import TrainConfig
from mcore.errors import ConfigError
from mcore.train.fingerprint import (
    DECAY_FIELDS,
    EXPERT_FIELDS,
    FIELDS,
    FP8_DELAYED_FIELDS,
    FP8_FIELDS,
    LORA_FIELDS,
    OFFLOAD_FIELD,
    claim,
    fingerprint,
    weights_digest,
)
from mcore.train.schedule import Schedule

MAY_DIFFER = {
    "backend",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "micro_batch_size",
    "packing",  # which samples share a row changes no more than which share a micro-batch
    "packing_length",
    "cross_entropy_chunk_tokens",
    "gradient_accumulation_fusion",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "load_safetensors",  # the weights themselves are in it
    "save_safetensors",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "logging_steps",
    "async_save",
    "exit_duration_in_mins",
    # They decide about steps that are still to come, so that a run which such a step ended can get past it.
    "bad_step_policy",
    "max_bad_steps",
    "loss_spike_factor",
    "accept_changed_data",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "optimizer_offload_fraction",  # which of two Adams updates a weight changes no more than rounding
}
RESOLVED = {"train_iters", "num_train_epochs", "lr_warmup_fraction", "lr_warmup_iters"}


def mark(base: Path, data: str = "d", **fields: Any) -> dict[str, Any]:
    config = TrainConfig.model_validate({"train_iters": 10} | fields)
    schedule = Schedule(config.train_iters or 0, 0)
    return fingerprint(config, schedule, data=data, validation="v", base_weights=base / "release")


def test_every_field_of_training_is_either_in_the_fingerprint_or_named_as_free() -> None:
    of_some_runs = {*LORA_FIELDS, "target_modules", "modules_to_save", "adapter_load", *EXPERT_FIELDS, *DECAY_FIELDS,
                    OFFLOAD_FIELD, *FP8_FIELDS, *FP8_DELAYED_FIELDS}  # fmt: skip
    assert set(FIELDS) | of_some_runs | MAY_DIFFER | RESOLVED == set(TrainConfig.model_fields)
    assert not set(FIELDS) & (MAY_DIFFER | RESOLVED | of_some_runs)


def test_a_run_in_fp8_is_told_apart_by_what_its_recipe_reads(base: Path) -> None:
    assert "fp8_recipe" not in mark(base)["train"]
    delayed, tensorwise = ({"fp8_format": "hybrid", "fp8_recipe": recipe} for recipe in ("delayed", "tensorwise"))
    marks = [mark(base, **fields) for fields in ({}, delayed, tensorwise, delayed | {"fp8_amax_history_len": 16})]
    assert all(one != other for number, one in enumerate(marks) for other in marks[:number])
    assert "fp8_amax_history_len" not in marks[2]["train"]


def test_adapters_are_told_apart_by_their_settings_and_by_what_they_start_from(base: Path, tmp_path: Path) -> None:
    plain = mark(base, tuner_type="lora")
    assert "lora_rank" not in mark(base)["train"]
    (tmp_path / "adapter_model.safetensors").write_text("weights")
    others = ({"lora_rank": 4}, {"use_rslora": True}, {"target_modules": ("q_proj",)}, {"adapter_load": str(tmp_path)},
              {"modules_to_save": ("norm",)})  # fmt: skip
    marks = [plain, *(mark(base, tuner_type="lora", **other) for other in others)]
    (tmp_path / "adapter_model.safetensors").write_text("others")
    marks.append(mark(base, tuner_type="lora", adapter_load=str(tmp_path)))
    assert all(one != other for number, one in enumerate(marks) for other in marks[:number])


def test_decays_of_another_length_or_kind_are_told_apart(base: Path) -> None:
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3}
    others = ({}, {"lr_decay_iters": 8}, {"lr_decay_iters": 9}, wsd, {**wsd, "lr_wsd_decay_iters": 4})
    marks = [mark(base, **other) for other in (*others, {**wsd, "lr_wsd_decay_style": "linear"})]
    assert all(one != other for number, one in enumerate(marks) for other in marks[:number])
    assert not set(DECAY_FIELDS) & set(marks[0]["train"])


def test_what_full_experts_drop_depends_on_the_layout_so_it_must_stay(base: Path, tmp_path: Path) -> None:
    free = {"micro_batch_size": 2}
    assert mark(base, **free) == mark(base)
    full = {"moe_expert_capacity_factor": 1.0}
    claim(tmp_path, mark(base, **full))
    shutil.copytree(base / "release", tmp_path / "iter_0000005")
    claim(tmp_path, mark(base, **full))
    for other in (free, {"packing": False}, {"tensor_model_parallel_size": 2}):
        with pytest.raises(ConfigError, match=next(iter(other))):
            claim(tmp_path, mark(base, **full, **other))


def test_a_run_goes_on_from_its_own_checkpoints_in_any_layout(base: Path, tmp_path: Path) -> None:
    claim(tmp_path, mark(base))
    shutil.copytree(base / "release", tmp_path / "iter_0000005")
    claim(tmp_path, mark(base, tensor_model_parallel_size=2, micro_batch_size=4, save_steps=3))


def test_another_run_is_refused_and_told_what_differs(base: Path, tmp_path: Path) -> None:
    claim(tmp_path, mark(base, lr=1e-4))
    shutil.copytree(base / "release", tmp_path / "iter_0000005")
    before = (tmp_path / "fingerprint.json").read_text()
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path, mark(base, lr=2e-4, train_iters=11, data="other"))
    assert [problem.subject for problem in caught.value.problems] == ["data.train", "train.lr", "train.train_iters"]
    assert "0.0001" in str(caught.value) and "0.0002" in str(caught.value)
    assert (tmp_path / "fingerprint.json").read_text() == before


def test_without_a_checkpoint_there_is_nothing_to_mix_up(base: Path, tmp_path: Path) -> None:
    claim(tmp_path, mark(base, lr=1e-4))
    claim(tmp_path, mark(base, lr=2e-4))
    assert "0.0002" in (tmp_path / "fingerprint.json").read_text()


@pytest.mark.parametrize("content", [None, "no json", "[]"])
def test_checkpoints_of_nobody_knows_which_run_are_refused(base: Path, tmp_path: Path, content: str | None) -> None:
    shutil.copytree(base / "release", tmp_path / "iter_0000005")
    if content is not None:
        (tmp_path / "fingerprint.json").write_text(content)
    with pytest.raises(ConfigError):
        claim(tmp_path, mark(base))


def test_a_folder_that_is_no_run_is_refused_and_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        claim(tmp_path, mark(base))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError):
        claim(tmp_path / "thesis.tex", mark(base))
    for name in ("empty", "killed"):
        (tmp_path / name).mkdir()
    (tmp_path / "killed" / ".fingerprint.json.123").write_text("{")
    for name in ("empty", "killed", "new/nested"):
        claim(tmp_path / name, mark(base))
        assert (tmp_path / name / "fingerprint.json").exists()


def test_one_changed_weight_is_another_base(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "release", tmp_path / "release")
    assert weights_digest(tmp_path / "release") == weights_digest(base / "release")
    shard = next((tmp_path / "release").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert weights_digest(tmp_path / "release") != weights_digest(base / "release")
