"""From rows to token ids and a loss mask, by the chat template that came with the model.

The text of a conversation is what the tokenizer's own template makes of all its messages. Which tokens are trained is
not guessed from markers but proven turn by turn: the *prompt* of an assistant turn (all messages before it, rendered
with the generation prompt, which is what a server renders before that turn) must be a beginning of the text, and its
tokens a beginning of the text's tokens. What follows it, up to and with the special token that ends the turn, is what
the model must say, and is trained. Headers, other turns and white space between turns are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from mcore.data.rows import Method, Row
from mcore.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_DATE = datetime(2024, 7, 26)
"""What a template that asks for today's date is told: the date that the Llama 3 templates have as their own default.
With the real date, the same rows would be other samples tomorrow, and a resumed run would be refused."""

ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: token ids, and whether each token is a target of the loss.

    `loss_mask[i]` is about token `i` itself, so a trainer that predicts token `i` from the ones before it shifts both.
    The first token is never a target. `place` is the row's `file:line`.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[bool]
    place: str = ""


def load_tokenizer(hf_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, from its files only.

    Raises:
        DataError: The folder has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # transformers and tokenizers raise many kinds for damaged files
        reason = f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"
        raise DataError("the tokenizer can't be loaded", [Problem(str(hf_dir), "tokenizer files", reason)]) from exc


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[list[Sample], list[Problem]]:
    """Tokenise rows.

    Args:
        rows: Checked rows, placeholders filled (`mcore.data.rows`).
        tokenizer: Of the model that is trained or judged.
        method: `sft` takes the rows' messages, `pt` their text.
        advance: Called with the number of rows done since the last call.

    Returns:
        A sample for each row that can be one, and all problems of the others.
    """
    encoder: _Sft | _Pt = _Sft(tokenizer) if method == "sft" else _Pt(tokenizer)
    if encoder.problems:
        return [], encoder.problems
    samples: list[Sample] = []
    problems: list[Problem] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE]
        for result in encoder.encode(batch):
            if isinstance(result, Sample):
                samples.append(result)
            else:
                problems.append(result)
        advance(len(batch))
    return samples, problems


class _Pt:
    """`text` as the tokenizer makes it, with its own special tokens, and the end-of-text token behind it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.problems = [] if tokenizer.eos_token_id is not None else [Problem("the tokenizer", "an eos_token", "none")]

    def encode(self, rows: Sequence[Row]) -> Iterator[Sample | Problem]:
        eos_id = self.tokenizer.eos_token_id
        for row, ids in zip(rows, self.tokenizer([row.text for row in rows])["input_ids"], strict=True):
            if not ids or ids[-1] != eos_id:
                ids = [*ids, eos_id]
            yield Sample(ids, [False] + [True] * (len(ids) - 1), row.place)


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation as text, and the prompts of its assistant turns, each with the token that ends its turn."""

    row: Row
    text: str
    prompts: list[str]
    end_tokens: list[str]


class _Sft:
    """`messages` through the chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.problems = []
        if not tokenizer.chat_template:
            self.problems.append(
                Problem("the tokenizer", "a chat template", "none", "Use an instruct model, or method: pt.")
            )
        added = tokenizer.added_tokens_decoder.items()
        self.special = {token.content: token_id for token_id, token in added if token.special}
        self.special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        if not self.special:
            self.problems.append(Problem("the tokenizer", "special tokens that end a turn", "none"))
        longest_first = sorted(self.special, key=len, reverse=True)
        self.special_text = re.compile("|".join(map(re.escape, longest_first)))

    def encode(self, rows: Sequence[Row]) -> Iterator[Sample | Problem]:
        rendered = [self._render(row) for row in rows]
        good = [item for item in rendered if isinstance(item, _Rendered)]
        texts = [text for item in good for text in (item.text, *item.prompts)]
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
        for item in rendered:
            yield (
                item if isinstance(item, Problem) else self._mask(item, next(ids), list(islice(ids, len(item.prompts))))
            )

    def _apply(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                strftime_now=RENDER_DATE.strftime,
            )
        )

    def _render(self, row: Row) -> _Rendered | Problem:
        from jinja2 import TemplateError

        for index, message in enumerate(row.messages):
            inside = self.special_text.search(message.content)
            if inside:
                return Problem(
                    f"{row.place}: messages[{index}].content",
                    "no special token of the tokenizer",
                    repr(inside[0]),
                    "It would be read as a mark between turns; take it out.",
                )
        messages = [{"role": message.role, "content": message.content} for message in row.messages]
        turns = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
        try:
            text = self._apply(messages, add_generation_prompt=False)
            prompts = [self._apply(messages[:index], add_generation_prompt=True) for index in turns]
        except TemplateError as exc:
            return Problem(row.place, "a conversation that the chat template takes", str(exc))
        lost = _first_lost(row, text)
        if lost is not None:
            return Problem(
                f"{row.place}: the chat template leaves out messages[{lost}] ({row.messages[lost].role})",
                fix="Take the message out of the row, or use another template.",
            )
        end_tokens = []
        for index, prompt in zip(turns, prompts, strict=True):
            where = f"{row.place}: the chat template at messages[{index}]"
            if not text.startswith(prompt):
                at = _first_difference(text, prompt)
                return Problem(
                    where,
                    "the text of the messages before, with the generation prompt, to begin the whole text",
                    f"{text[at : at + 30]!r} instead of {prompt[at : at + 30]!r} at character {at}",
                    "Trained like this, the model would learn other prompts than a server makes; use another template.",
                )
            end = self.special_text.search(text, len(prompt))
            if end is None or _spoken(row.messages[index].content) not in text[len(prompt) : end.start()]:
                found = repr(text[len(prompt) : len(prompt) + 60])
                return Problem(where, "the answer and then a special token that ends the turn", found)
            end_tokens.append(end[0])
        return _Rendered(row, text, prompts, end_tokens)

    def _mask(self, item: _Rendered, ids: list[int], prompts: list[list[int]]) -> Sample | Problem:
        mask = [False] * len(ids)
        for prompt, end_token in zip(prompts, item.end_tokens, strict=True):
            start = len(prompt)
            if ids[:start] != prompt:
                return Problem(
                    f"{item.row.place}: the tokens of the generation prompt change when the answer follows",
                    fix="A server would make others. Take white space off the front of the assistant's message; if it "
                    "has none, this template does not fit this tokenizer.",
                )
            end = next((index for index in range(start, len(ids)) if ids[index] == self.special[end_token]), None)
            if end is None:
                return Problem(f"{item.row.place}: the tokenizer", f"{end_token!r} as one token", "several")
            mask[start : end + 1] = [True] * (end + 1 - start)
        # Behind the last trained token there is at most white space or, in some templates, a generation prompt.
        last = max(index for index, trained in enumerate(mask) if trained)
        return Sample(ids[: last + 1], mask[: last + 1], item.row.place)


def _spoken(content: str) -> str:
    # Templates of reasoning models take the thoughts out of earlier turns and trim what is left.
    return content.rpartition("</think>")[2].strip()


def _first_lost(row: Row, text: str) -> int | None:
    at = 0
    for index, message in enumerate(row.messages):
        spoken = _spoken(message.content) if message.role == "assistant" else message.content.strip()
        at = text.find(spoken, at)
        if at < 0:
            return index
        at += len(spoken)
    return None


def _first_difference(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
