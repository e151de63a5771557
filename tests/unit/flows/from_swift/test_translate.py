"""What becomes of arguments, one by one and together."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.schema.run import RunConfig
from flows.from_swift import table
from flows.from_swift.command import read_command
from flows.from_swift.draft import Finding
from flows.from_swift.run_file import run_file
from flows.from_swift.translate import Translation, as_tree, translate
from mcore.errors import ConfigError
from tests.unit.flows.from_swift.commands import DENSE_SFT, MOE_LORA, PT_PACKING, QUICK_START, write_workspace

LEAST = "megatron sft --model model --dataset rows.jsonl --max_length 64 --torch_dtype bfloat16 --train_iters 5 "


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(write_workspace(tmp_path))
    return tmp_path


def of(text: str) -> Translation:
    return translate(read_command(text))


def finding(done: Translation, argument: str, outcome: str | None = None) -> Finding:
    (found,) = (one for one in done.findings if one.argument == argument and outcome in (None, one.outcome))
    return found


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        of(text)
    return str(error.value)


EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "dense sft": (
        DENSE_SFT,
        {
            "name": "tiny-sft",
            "model": {"source": "model"},
            "data": {
                "dataset": ["rows.jsonl#12", "val.jsonl"], "split_dataset_ratio": 0.1, "max_length": 64,
                "truncation_strategy": "delete", "model_name": "swift-robot", "model_author": "swift",
                "system": "You answer in one word.", "dataset_num_proc": 4,
            },
            "train": {
                "method": "sft", "tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 4,
                "global_batch_size": 8, "num_train_epochs": 3.0, "lr": 3e-5, "min_lr": 3e-6, "lr_warmup_fraction": 0.1,
                "torch_dtype": "float32", "recompute_granularity": "full", "recompute_method": "uniform",
                "recompute_num_layers": 1, "save_safetensors": True, "save_steps": 40, "logging_steps": 5,
            },
            "launch": {"nproc_per_node": 2},
        },
    ),
    "moe lora": (
        MOE_LORA,
        {
            "name": "moe",
            "model": {"source": "moe"},
            "data": {
                "dataset": ["rows.jsonl"], "val_dataset": ["val.jsonl"], "max_length": 48,
                "truncation_strategy": "delete", "model_name": "robot",
            },
            "train": {
                "method": "sft", "tuner_type": "lora", "lora_rank": 16, "lora_alpha": 64.0,
                "target_modules": ["all-linear"], "pipeline_model_parallel_size": 2,
                "decoder_last_pipeline_num_layers": 1, "expert_model_parallel_size": 2, "micro_batch_size": 2,
                "global_batch_size": 8, "train_iters": 50, "lr": 1e-4, "min_lr": 1e-5, "lr_warmup_iters": 5,
                "torch_dtype": "float32", "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-3,
                "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
                "save_steps": 25, "eval_steps": 25, "logging_steps": 1, "async_save": True,
            },
            "launch": {"nproc_per_node": 4},
        },
    ),
    "pt packing": (
        PT_PACKING,
        {
            "name": "pt",
            "model": {"source": "model"},
            "data": {"dataset": ["text.jsonl"], "max_length": 64, "truncation_strategy": "delete"},
            "train": {
                "method": "pt", "packing": True, "packing_length": 256, "global_batch_size": 4, "train_iters": 20,
                "lr": 1e-4, "lr_decay_style": "constant", "weight_decay": 0.0, "torch_dtype": "bfloat16",
                "recompute_granularity": "selective", "save_safetensors": True, "save_steps": 10,
                "save_total_limit": 2, "logging_steps": 5,
            },
            "export": {"max_shard_size_gb": 2.0},
            "launch": {"nproc_per_node": 1},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", EXPECTED)
def test_a_command_becomes_this_run_and_no_other(shape: str) -> None:
    text, expected = EXPECTED[shape]
    done = of(text)
    assert as_tree(done.values) == expected
    written = yaml.safe_load(run_file(done))
    assert written == expected
    RunConfig.model_validate(written)
    given = set(read_command(text).arguments)
    assert given <= {one.argument for one in done.findings}, "an argument was dropped without a word"


def test_the_quick_start_is_carried_over_whole() -> None:
    command = read_command(QUICK_START)
    done = translate(command)
    told = {one.argument: one for one in done.findings}
    assert set(command.arguments) | set(command.environment) <= set(told)
    assert [one.argument for one in done.findings if one.outcome == "unknown"] == []
    # The model is on a hub: only its config.json says what the dtype is.
    assert {one.argument for one in done.findings if one.needs_a_look} == {"torch_dtype"}
    left_out = {one.argument for one in done.findings if one.outcome == "left out"}
    assert left_out == {
        "no_save_optim",
        "no_save_rng",
        "num_workers",
        "PYTORCH_CUDA_ALLOC_CONF",
        "CUDA_VISIBLE_DEVICES",
    }
    run = RunConfig.model_validate(as_tree(done.values))
    assert run.model.source == "ms:Qwen/Qwen2.5-7B-Instruct" and run.launch.nproc_per_node == 2
    assert run.data.dataset == (
        "AI-ModelScope/alpaca-gpt4-data-zh#500",
        "AI-ModelScope/alpaca-gpt4-data-en#500",
        "swift/self-cognition#500",
    )
    assert (run.data.system, run.data.model_name) == ("You are a helpful assistant.", "swift-robot")


def test_defaults_that_are_not_ours_are_written_out() -> None:
    done = of("megatron sft --model model --dataset rows.jsonl --train_iters 5")
    assert {one.argument: one.where for one in done.findings if one.outcome == "default"} == {
        "torch_dtype": "train.torch_dtype: float32",
        "max_length": "data.max_length: 64",  # of the model's config
        "truncation_strategy": "data.truncation_strategy: delete",
        "recompute_granularity": "train.recompute_granularity: selective",
        "save_safetensors": "train.save_safetensors: true",
        "logging_steps": "train.logging_steps: 5",
    }
    lora = of("megatron sft --model model --dataset rows.jsonl --train_iters 5 --train_type lora")
    assert lora.values["train.lr"] == 1e-4 and finding(lora, "lr").outcome == "default"
    assert "train.save_safetensors" not in lora.values
    assert done.needs_a_look == lora.needs_a_look == 0


@pytest.mark.parametrize("tuner_type", ["full", "lora"])
def test_what_is_not_said_is_as_there(tuner_type: str) -> None:
    run = RunConfig.model_validate(as_tree(of(LEAST + f"--tuner_type {tuner_type}").values)).model_dump(mode="json")
    apart = {
        "packing",
        "padding_free",
        "no_gradient_accumulation_fusion",
        "save_safetensors",
        "gradient_accumulation_fusion",
    }
    apart |= {"cross_entropy_loss_fusion", "max_shard_size", "model_author", "model_name", "use_hf"}
    compared = 0
    for row in table.arguments():
        default = row.default_with(tuner_type)
        if (
            row.target is None
            or default is None
            or default == []
            or row.name in apart
            or row.name in read_command(LEAST).arguments
        ):
            continue
        if tuner_type == "full" and row.needs == "tuner_type lora":
            continue
        group, _, name = row.target.partition(".")
        expected = tuner_type if row.name == "tuner_type" else row.here(default)
        assert run[group][name] == expected, row.name
        compared += 1
    assert compared > 30


def test_what_is_not_known_here_is_to_be_done() -> None:
    done = of("megatron sft --model Qwen/Qwen2.5-7B-Instruct --dataset rows.jsonl --train_iters 5")
    assert done.values["model.source"] == "ms:Qwen/Qwen2.5-7B-Instruct"
    assert {one.argument for one in done.findings if one.outcome == "to do"} == {"torch_dtype", "max_length"}
    # Nobody knows what is too long, so a sample that is must not vanish.
    assert done.values.get("data.truncation_strategy", "raise") == "raise"
    assert "# Megatron-SWIFT takes the model's maximum; put it here.\n  max_length: 2048" in run_file(done)
    assert done.needs_a_look == 2


@pytest.mark.parametrize(
    ("words", "source"),
    [
        ("--model Qwen/Qwen3-0.6B --use_hf true", "hf:Qwen/Qwen3-0.6B"),
        ("--model Qwen/Qwen3-0.6B --use_hf false", "ms:Qwen/Qwen3-0.6B"),
        ("--model Qwen/Qwen3-0.6B --model_revision v1", "ms:Qwen/Qwen3-0.6B@v1"),
        ("--model /not/mounted/here", "/not/mounted/here"),
        ("--model model", "model"),
    ],
)
def test_models(words: str, source: str) -> None:
    assert of(f"{LEAST.replace('--model model', '')} {words}").values["model.source"] == source
    if "use_hf true" in words:
        assert of(f"USE_HF=1 {LEAST} --model Qwen/Qwen3-0.6B").values["model.source"] == source


@pytest.mark.parametrize(
    ("spec", "entry", "note"),
    [
        ("rows.jsonl#7", "rows.jsonl#7", ""),
        ("/elsewhere/rows.jsonl", "/elsewhere/rows.jsonl", ""),
        ("folder", "folder", ""),
        ("rows.csv#3", "rows.csv#3", ""),
        ("AI-ModelScope/alpaca-zh#500", "AI-ModelScope/alpaca-zh#500", "from ModelScope when the run needs it"),
        ("swift/self-cognition:qwen3#600", "swift/self-cognition:qwen3#600", "from ModelScope"),
        ("hf::org/set:sub", "hf::org/set:sub", "from the Hugging Face hub"),
        ("org/set#9 --use_hf true", "hf:org/set#9", "from the Hugging Face hub"),
        ("ms::org/set --use_hf true", "ms::org/set", "from ModelScope"),
    ],
)
def test_datasets(spec: str, entry: str, note: str) -> None:
    done = of(LEAST.replace("rows.jsonl", spec))
    assert done.values["data.dataset"] == [entry]
    found = finding(done, "dataset")
    assert note in found.note and bool(note) == bool(found.note)
    assert found.outcome == "carried" and done.needs_a_look == 0


def test_a_name_that_no_hub_has_is_refused() -> None:
    assert "--dataset hf:set: found no name of a data set" in refused(LEAST.replace("rows.jsonl", "hf:set"))


# What is given beside LEAST, a field and its value (or that the run does not say it), and what is told of the argument.
CASES: list[tuple[str, str, Any, str, str]] = [
    ("--lr 1e-4", "train.lr", 1e-4, "carried", ""),
    ("--lr_decay_style inverse-square-root", "train.lr_decay_style", "inverse-square-root", "carried", ""),
    ("--lr_decay_style polynomial", "train.lr_decay_style", None, "left out", "it stays cosine"),
    ("--merge_lora false --tuner_type lora", "export.merge_lora", False, "carried", "fp32"),
    ("--merge_lora false", "export.merge_lora", None, "left out", "has no effect"),
    ("--save_safetensors false --tuner_type lora", "export.merge_lora", False, "changed", "merge_lora"),
    ("--lr_decay_iters 4", "train.lr_decay_iters", 4, "carried", ""),
    ("--lr_decay_iters 4 --lr_decay_style constant", "train.lr_decay_iters", None, "left out", "has no effect"),
    ("--lr_wsd_decay_iters 4", "train.lr_wsd_decay_iters", None, "left out", "has no effect without"),
    ("--modules_to_save word_embeddings norm --tuner_type lora", "train.modules_to_save", ["word_embeddings", "norm"],
     "carried", ""),
    ("--save_interval 7", "train.save_steps", 7, "carried", ""),
    ("--sequence_parallel true", "train.sequence_parallel", None, "left out", "no effect without"),
    ("--lora_rank 4", "train.lora_rank", None, "left out", "has no effect without --tuner_type lora"),
    ("--main_grads_dtype bf16", "train.main_grads_dtype", None, "left out", "no effect without"),
    ("--recompute_num_layers 2", "train.recompute_num_layers", None, "left out", "no effect without"),
    ("--optimizer adam", "train.optimizer", None, "carried", "always so"),
    ("--optimizer muon", "train.optimizer", None, "left out", "AdamW"),
    ("--use_precision_aware_optimizer", "train.use_precision_aware_optimizer", True, "carried", ""),
    ("--calculate_per_token_loss false", "train.method", "sft", "left out", "mean over its trained tokens"),
    ("--loss_scale default", "data.loss_scale", "default", "carried", ""),
    ("--loss_scale last_round+ignore_empty_think", "data.loss_scale", "last_round+ignore_empty_think", "carried", ""),
    ("--loss_scale default+ignore_empty_think", "data.loss_scale", "ignore_empty_think", "carried", ""),
    ("--loss_scale hermes", "data.loss_scale", None, "left out", "it stays default"),
    ("--enable_thinking false", "data.enable_thinking", False, "carried", ""),
    ("--columns '{\"question\": \"query\"}'", "data.columns", {"question": "query"}, "carried", ""),
    ("--dataset_num_proc 8", "data.dataset_num_proc", 8, "carried", ""),
    ("--template qwen2_5", "data.template", None, "left out", "Jinja file"),
    ("--recompute_modules core_attn moe", "train.recompute_modules", ["core_attn", "moe"], "carried", ""),
    ("--recompute_modules layernorm", "train.recompute_modules", None, "left out", "it stays core_attn"),
    ("--no_gradient_accumulation_fusion true", "train.gradient_accumulation_fusion", False, "carried", ""),
    ("--gradient_accumulation_fusion true", "train.gradient_accumulation_fusion", None, "carried", "null"),
    ("--finetune false", "train.method", "sft", "left out", "can't go on from a checkpoint"),
    ("--padding_free false", "train.packing", False, "changed", "pads"),
    ("--packing false", "train.packing", None, "changed", "without padding"),
    ("--max_shard_size 500MB", "export.max_shard_size_gb", 0.5, "carried", ""),
    ("--max_shard_size many", "export.max_shard_size_gb", None, "left out", "must look like 5GB"),
    ("--truncation_strategy split", "data.truncation_strategy", None, "left out", "it stays raise"),
    ("--dataset_shuffle false", "data.dataset_shuffle", True, "left out", "one shuffle"),
    ("--model_author 魔搭 ModelScope", "data.model_author", ["魔搭", "ModelScope"], "carried", ""),
    ("--model_name swift-robot", "data.model_name", "swift-robot", "carried", ""),
    ("--moe_aux_loss_coeff 0 --moe_router_load_balancing_type aux_loss", "train.moe_router_load_balancing_type", None,
     "left out", "nothing is balanced"),
    ("--adapters some_folder", "train.adapter_load", None, "left out", "tuner_type lora"),
    ("--wandb_project mine", "train.method", "sft", "left out", ""),
    ("--num_train_epochs 2", "train.num_train_epochs", None, "left out", "train_iters is given too"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "field", "value", "outcome", "note"), CASES, ids=lambda part: str(part)[:40])
def test_an_argument(words: str, field: str, value: Any, outcome: str, note: str) -> None:
    done = of(LEAST + words)
    assert done.values.get(field) == value
    argument = words.split()[-2 if words.startswith("--moe_aux") else 0].removeprefix("--")
    found = finding(done, argument)
    assert found.outcome == outcome and note in found.note


def test_what_counts_for_the_exit_status() -> None:
    assert of(LEAST).needs_a_look == 0
    harmless = (
        "--moe_permute_fusion true",
        "--wandb_project x",
        "--no_save_optim true",
        "--optimizer adam",
        "--lora_rank 2",
    )
    for words in harmless:
        assert of(LEAST + words).needs_a_look == 0, words
    for words in (
        "--optimizer sgd",
        "--streaming true",
        "--freeze_parameters model.",
        "--grad_clip 1",
        "--template qwen",
    ):
        assert of(LEAST + words).needs_a_look == 1, words


def test_balancing_that_names_no_type_is_to_be_looked_at() -> None:
    done = of(LEAST + "--moe_aux_loss_coeff 1e-3")
    assert done.values["train.moe_router_load_balancing_type"] == "aux_loss"
    assert finding(done, "moe_router_load_balancing_type").outcome == "to do"


def test_routers_with_a_bias_keep_the_rate_of_there(here: Path) -> None:
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 30, "hidden_size": 16,
        "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": False,
        "attention_bias": False, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    (here / "model" / "config.json").write_text(json.dumps(config))
    assert of(LEAST).values["train.moe_router_bias_update_rate"] == 1e-3
    assert of(LEAST + "--moe_router_bias_update_rate 0").values["train.moe_router_bias_update_rate"] == 0
    assert "train.moe_router_bias_update_rate" not in of(LEAST + "--tuner_type lora").values
    assert "train.moe_router_bias_update_rate" not in of(LEAST.replace("--model model", "--model moe")).values


def test_packs_are_no_samples() -> None:
    done = of(LEAST + "--packing true --global_batch_size 32")
    assert done.values["train.packing"] is True and done.values["train.global_batch_size"] == 32
    assert finding(done, "global_batch_size").outcome == "to do"
    assert "this many packs" in run_file(done).partition("global_batch_size: 32")[0].replace("\n  # ", " ")
    assert finding(of(LEAST + "--packing true --packing_length 128"), "packing_length").outcome == "carried"


def test_unknown_arguments() -> None:
    done = of(LEAST + "--grad_clip 3 --zebra 1 --bad_step_policy skip")
    assert "did you mean --clip_grad?" in finding(done, "grad_clip").note
    assert "not among the arguments" in finding(done, "zebra").note
    assert "a run has train.bad_step_policy" in finding(done, "bad_step_policy").note


def test_yaml_means_the_same_as_words(here: Path) -> None:
    arguments = {
        "model": "model", "dataset": ["rows.jsonl"], "train_iters": 5, "max_length": 64, "torch_dtype": "bfloat16",
        "lr": 2e-5, "sequence_parallel": True, "tensor_model_parallel_size": 2, "model_name": ["a", "b"],
    }  # fmt: skip
    (here / "sft.yaml").write_text(yaml.safe_dump(arguments))
    words = LEAST + "--lr 2e-5 --sequence_parallel true --tensor_model_parallel_size 2 --model_name a b"
    assert of("NPROC_PER_NODE=2 megatron sft --config sft.yaml").values == of(f"NPROC_PER_NODE=2 {words}").values


def test_environment() -> None:
    done = of(f"NNODES=2 NODE_RANK=0 MASTER_PORT=29500 NPROC_PER_NODE=4 OMP_NUM_THREADS=8 {LEAST}")
    assert done.values["launch.nproc_per_node"] == 4
    assert finding(done, "NNODES").effect == "speed" and finding(done, "OMP_NUM_THREADS").effect == "speed"
    assert done.needs_a_look == 0


def test_the_runs_name() -> None:
    assert of(LEAST + "--output_dir out/My_Run!1").values["name"] == "my_run-1"
    assert of(LEAST).values["name"] == "model"
    assert translate(read_command(LEAST), "given").values["name"] == "given"


def test_a_system_message_in_a_file(here: Path) -> None:
    text = "Be brief.\n\n  - 'Never' say \"no\": 说 #1\n"
    (here / "system.txt").write_text(text)
    done = of(LEAST + "--system system.txt")
    assert done.values["data.system"] == yaml.safe_load(run_file(done))["data"]["system"] == text
    assert of(LEAST + "--system 'Be kind: 1.0'").values["data.system"] == "Be kind: 1.0"


def test_what_no_run_can_be_made_of_is_told_at_once() -> None:
    message = refused("NPROC_PER_NODE=all megatron sft --mcore_model out")
    for part in (
        "--model: expected the base model",
        "--dataset: expected at least one file",
        "--num_train_epochs",
        "NPROC",
    ):
        assert part in message
    assert "`mcore-flows train RUN.yaml --base DIR`" in message
    assert "must be a multiple of tensor_model_parallel_size" in refused(LEAST + "--tensor_model_parallel_size 2")
    assert "--model: expected a folder, or org/name" in refused(LEAST + "--model nothing")


def test_warm_up_stay_and_decay() -> None:
    done = of(LEAST + "--lr_decay_style WSD --lr_wsd_decay_iters 2 --lr_wsd_decay_style linear --lr_warmup_iters 1")
    train = RunConfig.model_validate(as_tree(done.values)).train
    assert (train.lr_decay_style, train.lr_wsd_decay_iters, train.lr_wsd_decay_style) == ("WSD", 2, "linear")
    assert "WSD needs lr_wsd_decay_iters" in refused(LEAST + "--lr_decay_style WSD")
