"""Commands of the shapes that people start with, and a workspace with tiny models for them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.tasks.model_folders import CONFIG, write_model, write_rows, write_safetensors

DENSE_SFT = r"""
# full parameters, two GPUs
MODEL=model
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
NPROC_PER_NODE=2 \
CUDA_VISIBLE_DEVICES=0,1 \
megatron sft \
    --model $MODEL \
    --save_safetensors true \
    --dataset rows.jsonl#12 \
              val.jsonl \
    --split_dataset_ratio 0.1 \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 4 \
    --global_batch_size 8 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --num_train_epochs 3 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 3e-5 \
    --lr_warmup_fraction 0.1 \
    --min_lr 3e-6 \
    --max_length 64 \
    --output_dir megatron_output/Tiny-SFT \
    --save_steps 40 \
    --system 'You answer in one word.' \
    --dataloader_num_workers 4 \
    --dataset_num_proc 4 \
    --no_save_optim true \
    --no_save_rng true \
    --model_author swift \
    --model_name swift-robot 2>&1 | tee train.log
"""

QUICK_START = r"""
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
NPROC_PER_NODE=2 \
CUDA_VISIBLE_DEVICES=0,1 \
megatron sft \
    --model Qwen/Qwen2.5-7B-Instruct \
    --save_safetensors true \
    --dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500' \
              'AI-ModelScope/alpaca-gpt4-data-en#500' \
              'swift/self-cognition#500' \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 16 \
    --global_batch_size 16 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 1e-5 \
    --lr_warmup_fraction 0.05 \
    --min_lr 1e-6 \
    --num_train_epochs 1 \
    --output_dir megatron_output/Qwen2.5-7B-Instruct \
    --save_steps 100 \
    --max_length 2048 \
    --system 'You are a helpful assistant.' \
    --num_workers 4 \
    --no_save_optim true \
    --no_save_rng true \
    --dataset_num_proc 4 \
    --model_author swift \
    --model_name swift-robot
"""
"""The arguments of Megatron-SWIFT's quick start, for two GPUs."""

MOE_LORA = r"""
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' NPROC_PER_NODE=4 CUDA_VISIBLE_DEVICES=0,1,2,3 \
megatron sft --model moe --tuner_type lora --lora_rank 16 --lora_alpha 64 --target_modules all-linear \
    --dataset rows.jsonl --val_dataset val.jsonl --expert_model_parallel_size 2 --pipeline_model_parallel_size 2 \
    --decoder_last_pipeline_num_layers 1 --moe_permute_fusion true --moe_grouped_gemm true \
    --moe_shared_expert_overlap true --moe_aux_loss_coeff 1e-3 --moe_router_load_balancing_type aux_loss \
    --micro_batch_size 2 --global_batch_size 8 --recompute_granularity full --recompute_method uniform \
    --recompute_num_layers 1 --train_iters 50 --lr_warmup_iters 5 --min_lr 1e-5 --max_length 48 \
    --save megatron_output/moe --eval_interval 25 --save_interval 25 --log_interval 1 --num_workers 2 \
    --attention_backend flash --async_save true --model_name robot
"""

PT_PACKING = r"""
NPROC_PER_NODE=1 megatron pt --model model --torch_dtype bfloat16 --dataset text.jsonl --packing true --max_length 64 \
    --packing_length 256 --global_batch_size 4 --train_iters 20 --lr 1e-4 --lr_decay_style constant --weight_decay 0 \
    --attention_backend flash --save_total_limit 2 --save_steps 10 --max_shard_size 2GB --output_dir out/pt
"""


def write_moe_model(folder: Path) -> None:
    """A Qwen3-MoE of two layers with four experts each; `write_model` gives the tokenizer."""
    write_model(folder)
    config = {name: value for name, value in CONFIG.items() if name not in {"tie_word_embeddings", "bos_token_id"}} | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 4, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": [30, 16], "model.norm.weight": [16], "lm_head.weight": [30, 16]}
    for layer in range(2):
        place = f"model.layers.{layer}."
        shapes |= {
            f"{place}self_attn.{name}.weight": shape
            for name, shape in {
                "q_proj": [16, 16], "k_proj": [8, 16], "v_proj": [8, 16], "o_proj": [16, 16],
                "q_norm": [4], "k_norm": [4],
            }.items()
        }  # fmt: skip
        shapes |= {f"{place}{name}.weight": [16] for name in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{place}mlp.gate.weight"] = [4, 16]
        for expert in range(4):
            for name, shape in {"gate_proj": [8, 16], "up_proj": [8, 16], "down_proj": [16, 8]}.items():
                shapes[f"{place}mlp.experts.{expert}.{name}.weight"] = shape
    write_safetensors(folder / "model.safetensors", shapes)


def write_workspace(folder: Path) -> Path:
    """Models and rows that the commands name."""
    write_model(folder / "model")
    write_moe_model(folder / "moe")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "val.jsonl", 3)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(20)))
    return folder
