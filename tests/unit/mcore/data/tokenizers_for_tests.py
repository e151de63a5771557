"""Small real tokenizers (byte-level BPE, trained on the spot) with chat templates of four shapes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the small red model learns to answer many short questions about the world\n\n\n",
    "Who are you? I am a robot. What is the capital of the country?\n\n\n\n    return x\n\n\n",
] * 20

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

BRACKETS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message here') }}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}<think>\n{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}\n</think>"
    "\n\n{% endif %}{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "headers": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    "brackets": ["<s>", "</s>"],
    "thinking": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
BOS = {"headers": "<|begin_of_text|>", "brackets": "<s>"}
EOS = {"chatml": "<|im_end|>", "headers": "<|eot_id|>", "brackets": "</s>", "thinking": "<|im_end|>"}
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "brackets": BRACKETS, "thinking": THINKING}


@cache
def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of that kind; shared, so don't change it (`copy.deepcopy` first)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "headers":  # as in tokenizers made for such templates, line ends stay together whatever follows
        lines = pre_tokenizers.Split(Regex(r"\s*[\r\n]+| ?\S+|\s+"), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL[kind],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind in BOS:
        bos = BOS[kind]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS[kind],
        chat_template=TEMPLATES[kind],
        **({"bos_token": BOS[kind]} if kind in BOS else {}),
    )
    if kind == "thinking":
        fast.add_tokens(["<think>", "</think>"])
    return fast


def write_hf_dir(folder: Path, kind: str, *, vocab_size: int | None = None) -> Path:
    """A Hugging Face folder without weights: config and tokenizer files."""
    tokenizer = small_tokenizer(kind)
    tokenizer.save_pretrained(folder)
    config = {"model_type": "llama", "vocab_size": len(tokenizer) if vocab_size is None else vocab_size}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
