"""Keys change with what a stage reads, and with nothing else. Every field of a run is in the table below."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from configs.schema.evaluate import EvaluateConfig
from configs.schema.launch import StageName
from configs.schema.promote import PromoteConfig
from configs.schema.run import RunConfig
from mcore.artifacts import Store
from tasks.graph import LOCAL, STAGES, stages

FROM_SELECT = {"select", "export", "verify_export", "evaluate_tuned", "compare", "promote"}
FROM_EXPORT = FROM_SELECT - {"select"}
FROM_TRAIN = {"train"} | FROM_SELECT
FROM_PREPARE = {"prepare"} | FROM_TRAIN
FROM_CONVERT = {"convert", "verify_convert"} | FROM_TRAIN
PROOFS = {"verify_convert", "verify_export", "promote"}
EVALUATION = {"evaluate_base", "evaluate_tuned", "compare", "promote"}
EVERYTHING_BEHIND_FETCH = {"prepare"} | FROM_CONVERT | EVALUATION
NOTHING: set[str] = set()

LORA = {"train.tuner_type": "lora"}
PP2 = {"train.pipeline_model_parallel_size": 2}
OVERLAP = {"train.overlap_grad_reduce": True, "train.overlap_param_gather": True}
OFFLOAD = {"train.optimizer_cpu_offload": True, "train.use_precision_aware_optimizer": True}
BALANCED = {"train.moe_router_load_balancing_type": "aux_loss", "train.moe_aux_loss_coeff": 0.1}

# Field: (new value, stages whose keys change). Values in a mapping set further fields, where one alone is no valid run.
NODES = {"launch.nnodes": 2, "launch.rdzv_endpoint": "127.0.0.2:29500"}
PODS = {"image": "registry/mcore-flows:1", "volume_claim": "store", "mount_path": "/store"}
TABLE = {
    "name": ("other", {"promote"}),  # of runs that give the model no name of its own
    "convert.make_vocab_size_divisible_by": (64, FROM_CONVERT),
    "convert.workers": (2, NOTHING),
    "verify.max_relative_error": (1.0e-5, PROOFS),
    "verify.num_prompts": (2, PROOFS),
    "verify.max_prompt_tokens": (32, PROOFS),
    "verify.dtype": ("bfloat16", PROOFS),
    "verify.max_noise_ratio": (1.1, PROOFS),
    "data.dataset": (["data/other.jsonl"], FROM_PREPARE),
    "data.val_dataset": (["data/other.jsonl"], FROM_PREPARE),
    "data.split_dataset_ratio": (0.1, FROM_PREPARE),
    "data.max_length": (64, FROM_PREPARE),
    "data.truncation_strategy": ("right", FROM_PREPARE),
    "data.model_name": ("other", FROM_PREPARE | EVALUATION),
    "data.model_author": ("other", FROM_PREPARE | EVALUATION),
    "data.system": ("Be brief.", FROM_PREPARE | EVALUATION),
    "data.columns": ({"data.columns": {"question": "query"}}, FROM_PREPARE),
    "data.adapter": ("data/other.jsonl", FROM_PREPARE),
    "data.max_dropped_rows": (5, FROM_PREPARE),
    "data.interleave_prob": ([1.0], FROM_PREPARE),
    "data.stopping_strategy": ("all_exhausted", FROM_PREPARE),
    "data.dataset_num_proc": (4, NOTHING),
    "data.template": ("data/other.jsonl", FROM_PREPARE),
    "data.enable_thinking": (False, FROM_PREPARE),
    "data.loss_scale": ("last_round", FROM_PREPARE),
    "data.multi_turn": ("split", FROM_PREPARE),
    "data.dataset_shuffle": (False, FROM_PREPARE),
    "data.data_seed": (1, FROM_PREPARE),
    "train.method": ("pt", FROM_PREPARE | EVALUATION),
    "train.backend": ("torch", FROM_TRAIN),
    "train.tuner_type": ("lora", FROM_TRAIN),
    "train.lora_rank": ({**LORA, "train.lora_rank": 4}, FROM_TRAIN),
    "train.lora_alpha": ({**LORA, "train.lora_alpha": 4.0}, FROM_TRAIN),
    "train.lora_dropout": ({**LORA, "train.lora_dropout": 0.1}, FROM_TRAIN),
    "train.use_rslora": ({**LORA, "train.use_rslora": True}, FROM_TRAIN),
    "train.target_modules": ({**LORA, "train.target_modules": ["q_proj"]}, FROM_TRAIN),
    "train.modules_to_save": ({**LORA, "train.modules_to_save": ["norm"]}, FROM_TRAIN),
    "train.adapter_load": ({**LORA, "train.adapter_load": "adapter"}, FROM_TRAIN),
    "train.async_save": (True, NOTHING),
    "train.exit_duration_in_mins": (1.0, NOTHING),
    "train.accept_changed_data": (True, NOTHING),
    "train.bad_step_policy": ("skip", FROM_TRAIN),
    "train.max_bad_steps": ({"train.bad_step_policy": "skip", "train.max_bad_steps": 1}, FROM_TRAIN),
    "train.loss_spike_factor": (2.0, FROM_TRAIN),
    "train.tensor_model_parallel_size": (2, FROM_TRAIN),
    "train.pipeline_model_parallel_size": (2, FROM_TRAIN),
    "train.context_parallel_size": (2, FROM_TRAIN),
    "train.virtual_pipeline_model_parallel_size": (
        {**PP2, "train.virtual_pipeline_model_parallel_size": 2},
        FROM_TRAIN,
    ),
    "train.decoder_first_pipeline_num_layers": ({**PP2, "train.decoder_first_pipeline_num_layers": 2}, FROM_TRAIN),
    "train.decoder_last_pipeline_num_layers": ({**PP2, "train.decoder_last_pipeline_num_layers": 2}, FROM_TRAIN),
    "train.expert_model_parallel_size": (2, FROM_TRAIN),
    "train.expert_tensor_parallel_size": (2, FROM_TRAIN),
    "train.moe_router_load_balancing_type": (BALANCED, FROM_TRAIN),
    "train.moe_aux_loss_coeff": ({**BALANCED, "train.moe_aux_loss_coeff": 0.2}, FROM_TRAIN),
    "train.moe_z_loss_coeff": (0.1, FROM_TRAIN),
    "train.moe_expert_capacity_factor": (1.5, FROM_TRAIN),
    "train.moe_token_drop_policy": (
        {"train.moe_expert_capacity_factor": 1.5, "train.moe_token_drop_policy": "position"},
        FROM_TRAIN,
    ),
    "train.moe_router_bias_update_rate": (0.001, FROM_TRAIN),
    "train.sequence_parallel": ({"train.sequence_parallel": True, "train.tensor_model_parallel_size": 2}, FROM_TRAIN),
    "train.use_distributed_optimizer": (False, FROM_TRAIN),
    "train.micro_batch_size": (2, FROM_TRAIN),
    "train.global_batch_size": (32, FROM_TRAIN),
    "train.packing": (False, FROM_TRAIN),
    "train.packing_length": (4096, FROM_TRAIN),
    "train.train_iters": (20, FROM_TRAIN),
    "train.num_train_epochs": ({"train.num_train_epochs": 1.0, "train.train_iters": None}, FROM_TRAIN),
    "train.lr": (1.0e-4, FROM_TRAIN),
    "train.min_lr": (1.0e-6, FROM_TRAIN),
    "train.lr_decay_style": ("linear", FROM_TRAIN),
    "train.lr_decay_iters": (9, FROM_TRAIN),
    "train.lr_wsd_decay_style": (
        {"train.lr_decay_style": "WSD", "train.lr_wsd_decay_iters": 2, "train.lr_wsd_decay_style": "linear"},
        FROM_TRAIN,
    ),
    "train.lr_wsd_decay_iters": ({"train.lr_decay_style": "WSD", "train.lr_wsd_decay_iters": 2}, FROM_TRAIN),
    "train.lr_warmup_fraction": (0.1, FROM_TRAIN),
    "train.lr_warmup_iters": (2, FROM_TRAIN),
    "train.weight_decay": (0.0, FROM_TRAIN),
    "train.clip_grad": (0.5, FROM_TRAIN),
    "train.adam_beta1": (0.8, FROM_TRAIN),
    "train.adam_beta2": (0.9, FROM_TRAIN),
    "train.adam_eps": (1.0e-6, FROM_TRAIN),
    "train.seed": (1, FROM_TRAIN),
    "train.torch_dtype": ("float32", FROM_TRAIN),
    "train.cross_entropy_chunk_tokens": (1024, FROM_TRAIN),
    "train.gradient_accumulation_fusion": (True, FROM_TRAIN),
    "train.use_precision_aware_optimizer": (True, FROM_TRAIN),
    "train.fp8_format": ("hybrid", FROM_TRAIN),
    "train.fp8_recipe": ({"train.fp8_recipe": "tensorwise", "train.fp8_format": "hybrid"}, FROM_TRAIN),
    "train.fp8_amax_history_len": ({"train.fp8_amax_history_len": 16, "train.fp8_format": "hybrid"}, FROM_TRAIN),
    "train.fp8_amax_compute_algo": (
        {"train.fp8_amax_compute_algo": "most_recent", "train.fp8_format": "hybrid"},
        FROM_TRAIN,
    ),
    "train.main_grads_dtype": (
        {"train.main_grads_dtype": "bfloat16", "train.use_precision_aware_optimizer": True},
        FROM_TRAIN,
    ),
    "train.exp_avg_dtype": (
        {"train.exp_avg_dtype": "bfloat16", "train.use_precision_aware_optimizer": True},
        FROM_TRAIN,
    ),
    "train.exp_avg_sq_dtype": (
        {"train.exp_avg_sq_dtype": "bfloat16", "train.use_precision_aware_optimizer": True},
        FROM_TRAIN,
    ),
    "train.overlap_grad_reduce": (True, FROM_TRAIN),
    "train.overlap_param_gather": (OVERLAP, FROM_TRAIN),
    "train.optimizer_cpu_offload": (OFFLOAD, FROM_TRAIN),
    "train.optimizer_offload_fraction": ({**OFFLOAD, "train.optimizer_offload_fraction": 0.5}, FROM_TRAIN),
    "train.recompute_granularity": ("selective", FROM_TRAIN),
    "train.recompute_method": (
        {"train.recompute_granularity": "full", "train.recompute_method": "uniform", "train.recompute_num_layers": 1},
        FROM_TRAIN,
    ),
    "train.recompute_num_layers": (
        {"train.recompute_granularity": "full", "train.recompute_method": "block", "train.recompute_num_layers": 2},
        FROM_TRAIN,
    ),
    "train.recompute_modules": (
        {"train.recompute_granularity": "selective", "train.recompute_modules": ["mlp"]},
        FROM_TRAIN,
    ),
    "train.load_safetensors": (True, FROM_TRAIN),
    "train.save_safetensors": (True, FROM_TRAIN),
    "train.save_steps": (5, FROM_TRAIN),
    "train.save_total_limit": (2, FROM_TRAIN),
    "train.eval_steps": (5, FROM_TRAIN),
    "train.logging_steps": (5, FROM_TRAIN),
    "select.strategy": ("best", FROM_SELECT),
    "select.iteration": ({"select.strategy": "iteration", "select.iteration": 10}, FROM_SELECT),
    "export.torch_dtype": ("bfloat16", FROM_EXPORT),
    "export.max_shard_size_gb": (1.0, FROM_EXPORT),
    "export.merge_lora": ({**LORA, "export.merge_lora": False}, FROM_TRAIN),
    "export.workers": (2, NOTHING),
    "evaluate.suite": ("data/other.jsonl", EVALUATION),
    "evaluate.perplexity_dataset": (["data/other.jsonl#3"], EVALUATION),
    "evaluate.torch_dtype": ("bfloat16", EVALUATION),
    "evaluate.max_model_len": (512, EVALUATION),
    "evaluate.max_tokens": (32, EVALUATION),
    "evaluate.min_pass_rate": (0.25, {"compare", "promote"}),
    "evaluate.max_regression": (0.5, {"compare", "promote"}),
    "evaluate.max_perplexity_ratio": (1.1, {"compare", "promote"}),
    "evaluate.worse_confidence": (0.95, {"compare", "promote"}),
    "evaluate.tensor_parallel_size": (2, EVALUATION),
    "evaluate.python": ("other/bin/python", NOTHING),
    "promote.alias": ("production", {"promote"}),
    "promote.model": ("other", {"promote"}),
    "promote.approval": (True, {"promote"}),
    "promote.timeout_s": (60.0, NOTHING),
    "promote.push": ("hf:org/name", {"promote"}),
    "promote.push_secret": ({"promote.push": "hf:org/name", "promote.push_secret": "token"}, {"promote"}),
    "launch.nproc_per_node": (4, FROM_TRAIN),
    "launch.nnodes": (NODES, FROM_TRAIN),
    "launch.launcher": ("slurm", NOTHING),
    "launch.slurm": ({"launch.launcher": "slurm", "launch.slurm": {"partition": "gpu"}}, NOTHING),
    "launch.kubernetes": ({"launch.launcher": "kubernetes", "launch.kubernetes": PODS}, NOTHING),
    "launch.rdzv_endpoint": (NODES, FROM_TRAIN),
    "launch.socket_ifname": ({**NODES, "launch.socket_ifname": "lo"}, FROM_TRAIN),
    "launch.join_timeout_s": (60.0, NOTHING),
    "launch.reattach_s": (60.0, NOTHING),
    "launch.timeout_s": (60.0, NOTHING),
    "launch.stage_timeout_s": ({"launch.stage_timeout_s": {"train": 60.0}}, NOTHING),
    "launch.stall_timeout_s": (60.0, NOTHING),
    "launch.grace_s": (60.0, NOTHING),
    "launch.retries": (5, NOTHING),
    "launch.retry_delay_s": (1.0, NOTHING),
    "launch.again": ({"launch.again": {"train": "once more"}}, FROM_TRAIN),
    "launch.devices": ((0, 1), NOTHING),
    "launch.device_slots": (4, NOTHING),
    "launch.device_locks": ("elsewhere", NOTHING),
    "launch.check_collectives": ("never", NOTHING),
    "launch.store": ("elsewhere", NOTHING),
}


@dataclass(frozen=True)
class Source:
    """Only what the graph reads of a resolved source."""

    identity: dict = field(default_factory=lambda: {"kind": "hf", "name": "org/name", "revision": "abc"})
    path: Path | None = None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("weights")
    for name in ("rows.jsonl", "other.jsonl", "suite.yaml"):
        (tmp_path / "data" / name).write_text(f"content of {name}")
    return tmp_path


def raw_run() -> dict:
    return {
        "name": "demo",
        "model": {"source": "hf:org/name"},
        "data": {"dataset": ["data/rows.jsonl"]},
        "train": {"train_iters": 10},
        "evaluate": {"suite": "data/suite.yaml", "min_pass_rate": 0.5},
        "promote": {"alias": "candidate"},
        "launch": {"nproc_per_node": 2},
    }


def run_with(updates: dict) -> RunConfig:
    raw = raw_run()
    for name, value in updates.items():
        group, _, field_name = name.partition(".")
        if field_name:
            raw.setdefault(group, {})[field_name] = value
        else:
            raw[group] = value
    return RunConfig.model_validate(raw)


def keys(run: RunConfig, source: Source | None = None) -> dict[str, str]:
    return {plan.name: plan.key for plan in stages(run, source or Source(), Store(run.launch.store))}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def fields_that_can_change() -> set[str]:
    """All fields of a run; a choice of one value is none yet."""
    names = set()
    for group, info in RunConfig.model_fields.items():
        model = {"evaluate": EvaluateConfig, "promote": PromoteConfig}.get(group, info.annotation)
        for name, field_info in getattr(model, "model_fields", {}).items():
            if get_origin(field_info.annotation) is not Literal or len(get_args(field_info.annotation)) > 1:
                names.add(f"{group}.{name}")
        if not hasattr(model, "model_fields"):
            names.add(group)
    return names


def test_the_table_has_every_field_of_a_run():
    by_themselves = {"model.source", "evaluate.num_served_prompts"}  # tested below
    assert fields_that_can_change() - by_themselves == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_field_changes_the_keys_of_the_stages_that_read_it(folder, name):
    value, expected = TABLE[name]
    updates = value if isinstance(value, dict) else {name: value}
    assert changed(keys(run_with({})), keys(run_with(updates))) == expected


def test_a_time_limit_can_be_set_for_every_stage():
    assert set(get_args(StageName)) == {stage.name for stage in STAGES}


def test_another_remote_model_changes_everything(folder):
    other = Source(identity={"kind": "hf", "name": "org/name", "revision": "def"})
    assert changed(keys(run_with({})), keys(run_with({}), other)) == {"fetch"} | EVERYTHING_BEHIND_FETCH


def test_a_local_model_counts_by_its_files_and_needs_no_fetch(folder):
    for place in ("one", "two"):
        (folder / place).mkdir()
        (folder / place / "config.json").write_text("{}")
        (folder / place / "model.safetensors").write_text("weights")
    one = keys(run_with({}), Source(path=folder / "one"))
    assert "fetch" not in one
    (folder / "two" / "README.md").write_text("not read by any stage")
    assert changed(one, keys(run_with({}), Source(path=folder / "two"))) == NOTHING
    (folder / "two" / "model.safetensors").write_text("Weights")
    assert changed(one, keys(run_with({}), Source(path=folder / "two"))) == EVERYTHING_BEHIND_FETCH
    first = next(plan for plan in stages(run_with({}), Source(path=folder / "one"), Store("store")))
    assert first.name == "prepare" and first.inputs["hf"].startswith(f"{LOCAL}/")


@pytest.mark.parametrize(
    ("file", "expected"), [("rows.jsonl", FROM_PREPARE), ("suite.yaml", EVALUATION), ("other.jsonl", NOTHING)]
)
def test_a_changed_file_counts_by_its_content(folder, file, expected):
    before = keys(run_with({}))
    (folder / "data" / file).write_text("other content")
    assert changed(before, keys(run_with({}))) == expected


def test_an_adapter_to_start_from_counts_by_its_content(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "adapter_model.safetensors").write_text("weights")
    before, after = (keys(run_with({**LORA, "train.adapter_load": name})) for name in ("adapter", "elsewhere"))
    assert changed(before, after) == NOTHING
    (folder / "elsewhere" / "adapter_model.safetensors").write_text("Weights")
    assert changed(before, keys(run_with({**LORA, "train.adapter_load": "elsewhere"}))) == FROM_TRAIN


def test_a_moved_file_does_not_count(folder):
    before = keys(run_with({}))
    (folder / "data" / "rows.jsonl").rename(folder / "data" / "moved.jsonl")
    assert changed(before, keys(run_with({"data.dataset": ["data/moved.jsonl"]}))) == NOTHING


def test_without_evaluation_its_stages_are_left_out(folder):
    assert keys(run_with({"evaluate": None, "promote": None})).keys() == keys(run_with({})).keys() - EVALUATION


def test_without_promotion_all_else_keeps_its_key(folder):
    promoting = keys(run_with({}))
    assert keys(run_with({"promote": None})) == {name: key for name, key in promoting.items() if name != "promote"}


def test_inputs_and_proofs_come_before_what_they_are_for():
    seen: set[str] = set()
    for stage in STAGES:
        assert set(stage.inputs.values()) | set(stage.proofs.values()) <= seen
        seen.add(stage.name)
    guarded = {stage.name: set(stage.proofs.values()) for stage in STAGES if stage.proofs}
    assert guarded == {
        "train": {"verify_convert"},
        "verify_served": {"verify_export"},
        "evaluate_tuned": {"verify_export", "verify_served"},
    }


def test_the_proof_of_what_is_served_stands_before_the_evaluation_if_it_is_asked_for(folder):
    def plans_with(updates):
        run = run_with(updates)
        return {plan.name: plan for plan in stages(run, Source(), Store(run.launch.store))}

    assert "verify_served" not in plans_with({})
    proven = plans_with({"evaluate.num_served_prompts": 4})
    names = list(proven)
    assert names.index("verify_export") < names.index("verify_served") < names.index("evaluate_tuned")
    assert proven["evaluate_tuned"].inputs["served"] == proven["verify_served"].artifact
    assert proven["verify_served"].inputs["proof"] == proven["verify_export"].artifact
    lora = {"train.tuner_type": "lora", "export.merge_lora": False, "evaluate.num_served_prompts": 4}
    adapted = plans_with(lora)["verify_served"].inputs
    assert adapted["model"] == adapted["base"] != adapted["adapter"]
    for updates in ({"data.max_length": 64}, {"evaluate.max_model_len": 512}, {"evaluate.num_served_prompts": 5}):
        changed_key = plans_with({"evaluate.num_served_prompts": 4} | updates)["verify_served"].key
        assert changed_key != proven["verify_served"].key


def test_training_from_safetensors_starts_from_the_model_itself(folder):
    run = run_with({"train.load_safetensors": True})
    plans = {plan.name: plan for plan in stages(run, Source(), Store("store"))}
    others = {"data": plans["prepare"].artifact, "proof": plans["verify_convert"].artifact}
    assert plans["train"].inputs == {"base": plans["fetch"].artifact} | others


def test_lineage_names_the_proof(folder):
    plans = {plan.name: plan for plan in stages(run_with({}), Source(), Store("store"))}
    others = {"data": plans["prepare"].artifact, "proof": plans["verify_convert"].artifact}
    assert plans["train"].inputs == {"base": plans["convert"].artifact} | others
    assert "proof" not in plans["train"].ingredients["inputs"]
