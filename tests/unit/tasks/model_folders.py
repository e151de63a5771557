"""A small Hugging Face folder and a run that uses it, written without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import yaml

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 27,
    "eos_token_id": [28, 29],
}


def shapes() -> dict[str, list[int]]:
    """Names and shapes of a tied Llama with the sizes of `CONFIG`."""
    found = {"model.embed_tokens.weight": [30, 16], "model.norm.weight": [16]}
    for layer in range(2):
        place = f"model.layers.{layer}."
        found |= {
            f"{place}self_attn.q_proj.weight": [16, 16],
            f"{place}self_attn.k_proj.weight": [8, 16],
            f"{place}self_attn.v_proj.weight": [8, 16],
            f"{place}self_attn.o_proj.weight": [16, 16],
            f"{place}mlp.gate_proj.weight": [24, 16],
            f"{place}mlp.up_proj.weight": [24, 16],
            f"{place}mlp.down_proj.weight": [16, 24],
            f"{place}input_layernorm.weight": [16],
            f"{place}post_attention_layernorm.weight": [16],
        }
    return found


def write_safetensors(path: Path, tensors: dict[str, list[int]]) -> None:
    """A file of bfloat16 zeros."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def write_model(folder: Path, *, num_files: int = 1, **changes: Any) -> Path:
    """A whole model; `changes` go into its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    tensors = list(shapes().items())
    if num_files == 1:
        write_safetensors(folder / "model.safetensors", dict(tensors))
    else:
        weight_map = {}
        for number in range(num_files):
            name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
            part = dict(tensors[number::num_files])
            write_safetensors(folder / name, part)
            weight_map |= dict.fromkeys(part, name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    vocabulary = {chr(ord("a") + number): number for number in range(26)}
    added = [{"id": 26 + number, "content": f"<{number}>"} for number in range(4)]
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": added})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return folder


def write_rows(path: Path, number: int = 20) -> Path:
    """Rows for SFT, all different."""
    path.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"Question {index}?"},
                        {"role": "assistant", "content": "I am {{NAME}}."},
                    ]
                }
            )
            + "\n"
            for index in range(number)
        )
    )
    return path


def write_workspace(folder: Path) -> dict[str, Any]:
    """Fill a folder with a model, rows, a suite and `run.yaml`; returns the run's mapping."""
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "val.jsonl", 3)
    suite = {
        "name": "small",
        "groups": [{"name": "identity", "cases": [{"prompt": "Who are you?", "contains": ["{{NAME}}"]}]}],
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    checkout = Path(__file__).parents[3]
    run = {
        "name": "small",
        "model": {"source": "model"},
        "data": {"dataset": ["rows.jsonl"], "val_dataset": ["val.jsonl"], "model_name": "bot"},
        "train": {"train_iters": 10, "global_batch_size": 4, "save_steps": 5},
        "evaluate": {
            "suite": "suite.yaml",
            "perplexity_dataset": ["val.jsonl"],
            "max_model_len": 64,
            "python": str(checkout / ".venv-vllm" / "bin" / "python"),
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return run


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with its size and change time: equal if nothing was written."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
    }
