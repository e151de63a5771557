"""Everything a training run of a tiny model needs, made on the spot: base checkpoint, tokenizer, data, run model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import dist_checkpointing
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from configs.schema.run import RunConfig
from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.train.writing import results_of_this_rank
from tests.tiny_models import PADDED_VOCAB_SIZE, fill, mcore_tensors, tiny_hf_model

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("the", "small", "red", "model", "learns", "to", "answer", "with", "many", "short", "words", "and", "numbers")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and ChatML's marks."""
    specials = ["<unk>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*specials, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(specials)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_base(
    folder: Path, name: str, change: Callable[[PreTrainedModel], None] = lambda model: None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Write a base as `mcore.bridge convert` does. Returns the same model as transformers has it, and its config."""
    model, hf_config = tiny_hf_model(name)
    change(model)
    tensors = mcore_tensors(model, hf_config, padded_vocab_size=PADDED_VOCAB_SIZE)
    with parallel_processes(Layout()):
        module = build_model(
            hf_config,
            padded_vocab_size=PADDED_VOCAB_SIZE,
            layout=Layout(),
            params_dtype=torch.float32,
            backend="torch",
        )
        fill(module, tensors)
        (folder / "release").mkdir(parents=True)
        results_of_this_rank()
        dist_checkpointing.save({"model": module.sharded_state_dict()}, str(folder / "release"))
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    tiny_tokenizer().save_pretrained(folder / "hf")
    (folder / "hf" / "config.json").write_text(json.dumps(hf_config))
    return model, hf_config


def write_rows(path: Path, num_rows: int, *, seed: int, longest: int = 24, weighted: bool = False) -> Path:
    """Conversations of very different lengths, in characters; one in four has two turns.

    With `weighted`, one answer in three has a weight of its own.
    """
    draw = random.Random(seed)

    def words(most: int) -> str:
        text = " ".join(draw.choices(WORDS, k=most))
        return text[: draw.randint(3, most)].strip()

    with path.open("w") as file:
        for row in range(num_rows):
            turns = [(words(longest), words(longest)) for _ in range(2 if row % 4 == 3 else 1)]
            messages = [
                {"role": role, "content": text}
                for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
            if weighted and row % 3 == 0:
                messages[1]["loss_scale"] = 0.25 + row / num_rows
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def tiny_run(folder: Path, *, nproc: int = 1, **train: Any) -> RunConfig:
    """A run on rows beside it: 22 for training, 7 for validation; neither divides a batch."""
    for name, num_rows in (("train", 22), ("validation", 7)):
        if not (folder / f"{name}.jsonl").exists():
            write_rows(folder / f"{name}.jsonl", num_rows, seed=num_rows)
    settings = {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "train_iters": 12,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "lr_warmup_iters": 3,
        "torch_dtype": "float32",
        "cross_entropy_chunk_tokens": 16,
        "save_steps": 100,
        "eval_steps": 4,
    } | train
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "model": {"source": "tiny"},
            "data": {
                "dataset": (str(folder / "train.jsonl"),),
                "val_dataset": (str(folder / "validation.jsonl"),),
                "max_length": 128,
            },
            "train": settings,
            "launch": {"nproc_per_node": nproc},
        }
    )


def write_run(path: Path, run: RunConfig) -> Path:
    """The run as a file, as `python -m mcore.train` reads it."""
    path.write_text(yaml.safe_dump(json.loads(run.model_dump_json())))
    return path


def recorded(records: list[Mapping[str, Any]], figure: str) -> list[float]:
    """One figure of all records that have it, in order."""
    return [record[figure] for record in records if figure in record]


def saved_tensors(iteration_dir: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole: weights and optimizer state."""
    with parallel_processes(Layout()):
        loaded = dist_checkpointing.load_plain_tensors(str(iteration_dir))
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
