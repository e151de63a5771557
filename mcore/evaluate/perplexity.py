"""Perplexity on held-out rows, over the very tokens that training counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema.data import DataConfig
from mcore.data.chat.options import stop_tokens
from mcore.data.load import load_files
from mcore.data.rows import Method, raise_problems
from mcore.data.template import Sample, TemplateOptions, encode_rows
from mcore.errors import EvaluationError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-probability (nats) of `num_tokens` tokens in `num_rows` rows."""

    value: float
    num_tokens: int
    num_rows: int
    row_losses: tuple[float, ...] = ()
    """For each row the sum of its negative log-probabilities (nats), which a paired comparison draws from."""
    row_tokens: tuple[int, ...] = ()
    """For each row the tokens that the sum is over."""


def text_samples(
    name: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_model_len: int
) -> tuple[list[Sample], list[Problem]]:
    """Tokens of a suite's plain texts, with the tokenizer's own special tokens; all but the first are counted.

    Args:
        name: Name of the perplexity set.
        texts: Its texts.
        tokenizer: Of the model under test.
        max_model_len: Tokens: the engine's limit.

    Returns:
        The samples, and all problems of their lengths.
    """
    samples = [
        Sample(ids, [False] + [True] * (len(ids) - 1), f"{name} {number}")
        for number, ids in enumerate(tokenizer(list(texts))["input_ids"], start=1)
    ]
    problems = [
        Problem(f"perplexity set {sample.place}", f"2 to {max_model_len - 1} tokens", str(len(sample.token_ids)))
        for sample in samples
        if not 2 <= len(sample.token_ids) < max_model_len
    ]
    return samples, problems


def held_out_samples(
    specs: Sequence[str], data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, method: Method, max_model_len: int
) -> list[Sample]:
    """Tokens and masks of held-out rows, as training would make them.

    Args:
        specs: `path` or `path#N`.
        data: Gives placeholders, system message and seed; its own files are not read.
        tokenizer: Of the model under test.
        method: `sft` for rows with `messages`, `pt` for rows with `text`.
        max_model_len: Tokens: the engine's limit.

    Raises:
        DataError: All that is wrong with files, rows and their lengths.
    """
    rows = load_files(specs, data, method, "evaluate.perplexity_dataset")
    # Each answer as a server has it before it: where a template shows earlier ones otherwise, it is measured by itself.
    stops = frozenset(stop_tokens(Path(tokenizer.name_or_path)))
    options = TemplateOptions(multi_turn="split", stop_tokens=stops)
    samples, problems = encode_rows(rows, tokenizer, method, options=options)
    problems += [
        # vLLM generates at least one token, so a row of the full length has no room.
        Problem(sample.place, f"fewer than {max_model_len} tokens (max_model_len)", str(len(sample.token_ids)))
        for sample in samples
        if len(sample.token_ids) >= max_model_len
    ]
    raise_problems("the held-out rows can't be used", problems)
    return samples


def perplexity(samples: Sequence[Sample], logprobs: Sequence[Sequence[float]]) -> Perplexity:
    """Perplexity over the tokens that the samples' masks name.

    Args:
        samples: Held-out samples.
        logprobs: For each the log-probability (nats) of its tokens from the second on; the first is never a target.

    Raises:
        EvaluationError: The result is not finite.
    """
    counted = [
        [logprob for logprob, is_target in zip(row, sample.loss_mask[1:], strict=True) if is_target]
        for sample, row in zip(samples, logprobs, strict=True)
    ]
    row_losses = tuple(-math.fsum(row) for row in counted)
    row_tokens = tuple(len(row) for row in counted)
    loss = math.fsum(row_losses) / sum(row_tokens)
    try:
        value = math.exp(loss)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise EvaluationError(
            "the perplexity is not finite", [Problem("mean loss (nats)", "a small number", str(loss))]
        )
    return Perplexity(value, sum(row_tokens), len(samples), row_losses, row_tokens)
