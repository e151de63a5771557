"""Cases that are judged by what the model finds probable: nothing is generated, and nothing can be said beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore.data.template import RENDER_DATE
from mcore.errors import Problem
from mcore.evaluate.engine import Answer
from mcore.evaluate.suites import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ChoiceTokens:
    """One choice of a question: the whole sequence, and how many tokens of it come before the choice."""

    token_ids: list[int]
    num_before: int


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question with all its choices as tokens, in the suite's order."""

    question: Question
    choices: tuple[ChoiceTokens, ...]


def encode_choices(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, max_model_len: int
) -> tuple[list[ChoiceQuestion], list[Problem]]:
    """The questions' choices as token ids behind their prompts, and all problems of them.

    A choice goes on from the generation prompt, or from `answer_prefix` and a space. Its tokens are those that follow
    what all of the question's sequences have in common up to there, so that a token that spans the border counts.
    """
    from jinja2 import TemplateError

    encoded, problems = [], []
    for question in questions:
        try:
            prompt = str(
                tokenizer.apply_chat_template(
                    question.messages, tokenize=False, add_generation_prompt=True, strftime_now=RENDER_DATE.strftime
                )
            )
        except TemplateError:
            continue  # `prompt_problems` tells of it, as of all questions
        prefix = question.case.answer_prefix
        before = f"{prompt}{prefix} " if prefix else prompt
        texts = [before.rstrip(" ") if prefix else before, *(before + choice for choice in question.case.choices)]
        context, *sequences = tokenizer(texts, add_special_tokens=False)["input_ids"]
        shared = min(_num_common(context, ids) for ids in sequences)
        longest = max(map(len, sequences))
        if longest >= max_model_len:
            problems.append(
                Problem(f"question {question.name}", f"fewer than {max_model_len} tokens (max_model_len)", str(longest))
            )
        encoded.append(ChoiceQuestion(question, tuple(ChoiceTokens(ids, shared) for ids in sequences)))
    return encoded, problems


def choose(question: ChoiceQuestion, logprobs: Sequence[Sequence[float]]) -> tuple[Answer, dict[str, float]]:
    """What the model finds most probable.

    Args:
        question: The question.
        logprobs: For each choice the log-probability (nats) of the sequence's tokens from the second on.

    Returns:
        The choice as an answer, and every choice's log-probability (nats; per token if normalised). Of choices that are
        as probable as each other none is chosen: a model that finds all alike knows nothing.
    """
    case = question.question.case
    scores: dict[str, float] = {}
    for text, tokens, values in zip(case.choices, question.choices, logprobs, strict=True):
        counted = values[tokens.num_before - 1 :]
        scores[text] = math.fsum(counted) / (len(counted) if case.length_normalised else 1)
    best = max(scores.values())
    winners = [index for index, text in enumerate(case.choices) if scores[text] == best]
    text = case.choices[winners[0]] if len(winners) == 1 else ""
    chosen = question.choices[winners[0]]
    prompt_ids, ids = chosen.token_ids[: chosen.num_before], chosen.token_ids[chosen.num_before :]
    return Answer(text, ids, prompt_ids, "chosen"), scores


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
