"""The fixed prompts of the numerical proof: texts of our own in several scripts and in code, and bare token ids.

The first prompt never depends on a tokenizer. It draws its ids evenly from the whole vocabulary, so that a shift of
vocabulary rows shows wherever it begins. Texts follow; behind the last text come further draws of ids.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from mcore.errors import ConfigError, Problem

Source = Literal["texts and seeded ids", "seeded ids only"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A folder with one of these has a tokenizer; it must load then."""

FIRST_EXTRA_SEED = 1000
"""Seed of the first prompt that is added to the usual ones."""

TEXTS: tuple[tuple[str, str], ...] = (
    (
        "scripts",
        "The ferry leaves at 7:45. Die Fähre fährt täglich außer sonntags. Le bac n'est pas complet aujourd'hui. "
        "渡轮每天早上七点四十五分出发,请提前到达码头。 朝の船は静かな海を渡って島へ向かいます。"
        "배는 아침 일찍 항구를 떠납니다. "
        "Паром отходит от третьего причала. Το πλοίο φεύγει νωρίς το πρωί. تغادر العبّارة كل صباح من الميناء القديم. "
        "नाव हर सुबह घाट से निकलती है। เรือออกจากท่าทุกเช้า. המעבורת יוצאת מוקדם בבוקר. ⛴️🌊",
    ),
    (
        "code",
        "def running_median(values: list[float], width: int = 5) -> list[float]:\n"
        '    """Median of each window; the ends use what is there."""\n'
        "    half = width // 2\n"
        "    windows = (sorted(values[max(0, i - half) : i + half + 1]) for i in range(len(values)))\n"
        "    return [w[len(w) // 2] for w in windows]\n\n"
        "\tfor (let i = 0; i < rows.length; ++i) { total += rows[i].price * 1.19; }\n"
        "SELECT name, COUNT(*) AS n FROM visits WHERE day >= '2024-02-29' GROUP BY name ORDER BY n DESC;\n",
    ),
    (
        "prose",
        "A lighthouse keeper wrote down the weather every evening for thirty-one years. Nobody had asked for it. When "
        "the light became automatic, the notebooks went into a cellar, and it took a flood to bring them up again. By "
        "then the harbour had silted up, the herring had moved north, and the wind, as they show, had turned by "
        "a few degrees. She had measured nothing but her evenings, yet they were enough to date the change to a year.",
    ),
    (
        "structure",
        '{"order": 10482, "items": [{"sku": "A-17/b", "count": 3, "price": 12.50}, {"sku": "C-04", "count": 1}], '
        '"paid": false, "note": null}\n| city | 2019 | 2024 |\n|---|---:|---:|\n| Bergen | 283 929 | 291 940 |\n'
        "1. Let x² + 2x - 3 = 0. Then (x + 3)(x - 1) = 0, so x ∈ {-3, 1}.\n2. ∫₀¹ 3t² dt = 1; √2 ≈ 1.41421.\n",
    ),
    (
        "dialogue",
        "User: Which of the two maps is older?\nAssistant: The one without the canal. Do you want to know why?\nUser: "
        "Yes, but briefly.\nAssistant: The canal was dug in 1874, and mapmakers drew it at once because it changed the "
        "route of the post.\nUser: ¿Y el otro? 另一张呢?\nAssistant: It shows the canal and no railway: 1874-1891.\n",
    ),
    (
        "repetition",
        "tick tock tick tock tick tock tick tock 000000000001 000000000010 000000000100 aaaaaaaaaaaaaaaa\n\n\n\n"
        "                    far to the right                    \t\t\t----====----====---- ?!?!?! (((())))\n",
    ),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its name and its token ids."""

    name: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """All prompts of one proof, and where their ids came from."""

    prompts: tuple[Prompt, ...]
    source: Source

    @property
    def digest(self) -> str:
        """SHA-256 over all token ids: two reports with the same digest compared the same prompts."""
        text = ";".join(",".join(map(str, prompt.token_ids)) for prompt in self.prompts)
        return hashlib.sha256(text.encode()).hexdigest()


def seeded_ids(seed: int, *, vocab_size: int, num_tokens: int) -> tuple[int, ...]:
    """One id from each of `num_tokens` equal parts of the vocabulary, shuffled; the first and the last row are in.

    Args:
        seed: The same seed gives the same ids on every machine.
        vocab_size: Rows without padding.
        num_tokens: Number of ids.
    """
    rng = random.Random(seed)
    edges = [part * vocab_size // num_tokens for part in range(num_tokens + 1)]
    ids = [rng.randrange(low, max(low + 1, high)) for low, high in pairwise(edges)]
    ids[0], ids[-1] = 0, vocab_size - 1
    rng.shuffle(ids)
    return tuple(ids)


def prompt_set(hf: Path, *, vocab_size: int, num_prompts: int, max_prompt_tokens: int) -> PromptSet:
    """The prompts for a model folder.

    Args:
        hf: Hugging Face folder; its tokenizer turns the texts into ids.
        vocab_size: Rows of the embedding, without padding.
        num_prompts: How many prompts.
        max_prompt_tokens: Length of the prompts of bare ids; texts are cut to it.

    Raises:
        ConfigError: The folder has a tokenizer that does not load, or one that does not fit the vocabulary.
    """
    has_tokenizer = any((hf / name).is_file() for name in TOKENIZER_FILES)
    texts = TEXTS[: num_prompts - 1] if has_tokenizer else ()
    prompts = [_seeded(0, vocab_size, max_prompt_tokens)]
    prompts += _tokenised(hf, texts, vocab_size, max_prompt_tokens)
    prompts += [_seeded(seed, vocab_size, max_prompt_tokens) for seed in range(1, 1 + num_prompts - len(prompts))]
    return PromptSet(tuple(prompts), "texts and seeded ids" if texts else "seeded ids only")


def extra_prompt(number: int, prompts: PromptSet, *, vocab_size: int) -> Prompt:
    """A further prompt of bare ids, other than all in the set, as long as its longest one."""
    num_tokens = max(len(prompt.token_ids) for prompt in prompts.prompts)
    return _seeded(FIRST_EXTRA_SEED + number, vocab_size, num_tokens)


def _seeded(seed: int, vocab_size: int, num_tokens: int) -> Prompt:
    return Prompt(f"seeded_{seed}", seeded_ids(seed, vocab_size=vocab_size, num_tokens=num_tokens))


def _tokenised(hf: Path, texts: tuple[tuple[str, str], ...], vocab_size: int, max_prompt_tokens: int) -> list[Prompt]:
    if not texts:
        return []
    from transformers import AutoTokenizer  # slow to import, and not needed for bare ids

    try:
        tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # transformers raises many kinds for a damaged file
        raise ConfigError("the tokenizer can't be loaded", [Problem(str(hf), "a tokenizer", repr(exc))]) from exc
    prompts = [Prompt(name, tuple(tokenizer(text)["input_ids"][:max_prompt_tokens])) for name, text in texts]
    problems = [
        Problem(
            f"prompt {prompt.name}",
            f"token ids below {vocab_size}, the rows of the embedding",
            f"id {max(prompt.token_ids)}",
            "The tokenizer belongs to another model.",
        )
        for prompt in prompts
        if max(prompt.token_ids) >= vocab_size
    ]
    if problems:
        raise ConfigError("the tokenizer does not fit the vocabulary", problems)
    return prompts
