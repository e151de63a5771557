"""Run by vLLM's interpreter: evaluate the base, then models made of it, healthy and damaged, one after the other.

damaged_models.py BASE SUITE OUTPUT SEED…     for each seed one of each KIND; OUTPUT gets a folder of answers for each

A model is written, evaluated as any other folder is, and removed: a set of ten seeds would take twenty gigabytes.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

from mcore.evaluate.engine import EngineSettings, prepare_environment
from mcore.evaluate.run import EvaluationSettings, evaluate

KINDS = ("healthy", "noised", "layer_dropped", "over_trained")
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
NOISE = 0.35
"""Standard deviation of the noise, in that of each matrix. The matrices of one layer in three get it."""
ROWS = Path("configs/data/general_qa.jsonl")


def make(base: Path, folder: Path, kind: str, seed: int) -> None:
    """Write a model that is made of the base."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    chosen = random.Random(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers = model.model.layers
    if kind == "noised":
        with torch.no_grad():
            for layer in chosen.sample(list(layers), len(layers) // 3):
                for weight in (one for one in layer.parameters() if one.dim() == 2):
                    weight += NOISE * weight.std() * torch.randn_like(weight)
    elif kind == "layer_dropped":
        # The first and the last do work of their own; one from between them is the smaller damage.
        del layers[chosen.randrange(1, len(layers) - 1)]
        model.config.num_hidden_layers = len(layers)
        model.config.layer_types = None
        for place, layer in enumerate(layers):
            layer.self_attn.layer_idx = place
    else:
        tokenizer = AutoTokenizer.from_pretrained(base)
        rows = [json.loads(line)["messages"] for line in ROWS.read_text().split("\n") if line]
        chosen.shuffle(rows)
        steps, lr, per_step = (12, 1e-5, 4) if kind == "healthy" else (12, 3e-4, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        for step in range(steps):
            taken = rows[step * per_step :][:per_step] if kind == "healthy" else rows[:1]
            for messages in taken:
                ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
                (model(input_ids=ids, labels=ids).loss / len(taken)).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    for name in FILES:
        if (base / name).exists():
            shutil.copy(base / name, folder)


def main(base: Path, suite: Path, output: Path, seeds: list[int]) -> None:
    """Evaluate them all."""
    prepare_environment()

    def judged(folder: Path, name: str) -> None:
        evaluate(EvaluationSettings(EngineSettings(folder, "float32", 256), suite), output / name)

    judged(base, "base")
    for seed in seeds:
        for kind in KINDS:
            folder = output / "model"
            make(base, folder, kind, seed)
            judged(folder, f"{kind}-{seed}")
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), [int(word) for word in sys.argv[4:]])
