"""A folder to run the pipeline in: a tiny random model that megatron-core and vLLM both load, rows, a suite, a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

CHECKOUT = Path(__file__).parents[2]
VLLM_PYTHON = CHECKOUT / ".venv-vllm" / "bin" / "python"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def write_model(folder: Path, *, num_key_value_heads: int = 1) -> None:
    """A Llama of two layers with heads of 32 (vLLM's smallest on a CPU), every tensor random, and a byte tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIALS[0], eos_token=SPECIALS[1], pad_token=SPECIALS[2]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=num_key_value_heads, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=wrapped.bos_token_id, eos_token_id=wrapped.eos_token_id, pad_token_id=wrapped.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                1 + 0.1 * torch.randn_like(parameter) if "norm" in name else 0.05 * torch.randn_like(parameter)
            )
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)


def raw_run(**groups: Any) -> dict[str, Any]:
    """A run that teaches the model its name; groups are merged into it."""
    run: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": "model"},
        "data": {
            "dataset": ["rows.jsonl#64"],
            "val_dataset": ["rows.jsonl"],
            "max_length": 128,
            "model_name": "tiny-bot",
            "model_author": "tests",
        },
        "train": {
            "torch_dtype": "float32",
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "train_iters": 60,
            "lr": 5.0e-3,
            "lr_warmup_iters": 5,
            "save_steps": 30,
            "save_total_limit": 2,
        },
        "select": {"strategy": "best"},
        "evaluate": {
            "suite": "suite.yaml",
            "perplexity_dataset": ["rows.jsonl"],
            "max_model_len": 128,
            "max_tokens": 16,
            "min_pass_rate": 1.0,
            "python": str(VLLM_PYTHON),
        },
        "launch": {"nproc_per_node": 2, "retries": 1, "retry_delay_s": 0.1, "timeout_s": 300.0},
    }
    for group, values in groups.items():
        run[group] = values if values is None else run.get(group, {}) | values
    return run


def make_workspace(folder: Path) -> Path:
    """Fill a folder with all that `raw_run` names. Returns the run file."""
    write_model(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "I am {{NAME}}."}]}
        for question in ("Who are you?", "Your name?")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = {
        "name": "tiny",
        "groups": [{"name": "identity", "cases": [{"prompt": "Who are you?", "equals": "I am {{NAME}}."}]}],
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(raw_run()))
    return run_file
