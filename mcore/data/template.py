"""From rows to token ids and a loss mask, by the chat template that came with the model.

The text of a conversation is what the tokenizer's own template (or the run's) makes of all its messages. Which of its
characters are trained is proven by `mcore.data.chat.turns`; here they become tokens, and it is made sure that the
tokens in front of an answer are those of the prompt that a server makes. Headers, other turns and white space between
turns are not trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore.data.chat.options import TemplateOptions
from mcore.data.chat.rendering import RENDER_DATE, ChatTemplate
from mcore.data.chat.turns import Accounting, Rendered, Turn
from mcore.data.rows import Method, Row
from mcore.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RENDER_DATE", "Sample", "TemplateOptions", "encode_rows", "load_tokenizer"]

ROWS_AT_ONCE = 512

DEFAULTS = TemplateOptions()

TAIL_CHARS = 400
"""How far in front of an answer the last special token of its prompt is looked for."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: token ids, and the weight of each token as a target of the loss: 0 for none, 1 unless a row says so.

    `loss_mask[i]` is about token `i` itself, so a trainer that predicts token `i` from the ones before it shifts both.
    The first token is never a target. `place` is the row's `file:line`.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[float]
    place: str = ""

    @property
    def num_trained(self) -> int:
        """Tokens with a weight."""
        return int(np.count_nonzero(self.loss_mask))


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
    *,
    options: TemplateOptions = DEFAULTS,
) -> tuple[list[Sample], list[Problem]]:
    """Tokenise rows.

    Args:
        rows: Checked rows, placeholders filled (`mcore.data.rows`).
        tokenizer: Of the model that is trained or judged.
        method: `pt` takes the rows' text, the others their messages.
        advance: Called with the number of rows done since the last call.
        options: What the run says about templates and masks.

    Returns:
        A sample for each row that can be one (several where a conversation is split), and all problems of the others.
    """
    encoder: _Chat | _Pt = _Pt(tokenizer) if method == "pt" else _Chat(tokenizer, options)
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
            yield Sample(ids, [0.0] + [1.0] * (len(ids) - 1), row.place)


class _Chat:
    """`messages` through the chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TemplateOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.accounting = Accounting(tokenizer, ChatTemplate(tokenizer, options))
        self.problems = self.accounting.problems()
        # Text is divided at these before anything else is done to it, so each part has its tokens to itself.
        dividing = [token.content for token in tokenizer.added_tokens_decoder.values() if _divides(token)]
        dividing.sort(key=len, reverse=True)
        self.dividing_text = re.compile("|".join(map(re.escape, dividing)) or r"(?!)")
        self.tails: dict[str, list[int]] = {}
        self.backend: Any = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = bool(tokenizer.split_special_tokens)

    def encode(self, rows: Sequence[Row]) -> Iterator[Sample | Problem]:
        rendered = [self.accounting.render(row) for row in rows]
        encodings = iter(
            self._encodings([part.text for found in rendered if isinstance(found, list) for part in found])
        )
        for found in rendered:
            if isinstance(found, Problem):
                yield found
                continue
            samples = [self._sample(part, next(encodings)) for part in found]
            # Of a conversation that is split, all samples or none.
            yield from [one for one in samples if isinstance(one, Problem)][:1] or samples

    def _encodings(self, texts: list[str]) -> Sequence[Any]:
        if not texts:
            return ()
        # What `tokenizer(texts)` does, without its lists of all that an encoding has.
        found: Sequence[Any] = self.backend.encode_batch(texts, add_special_tokens=False)
        return found

    def _sample(self, item: Rendered, encoding: Any) -> Sample | Problem:
        ids: list[int] = encoding.ids
        last = self._end_place(item.last_end, item.last_end_token, encoding, ids)
        if last is None:
            return Problem(f"{item.row.place}: the tokenizer", f"{item.last_end_token!r} as one token", "several")
        # Behind the end of the last turn there is at most white space or, in some templates, a generation prompt.
        mask = [0.0] + [1.0 if self.options.loss_scale == "all" else 0.0] * last
        for turn in item.turns:
            start, end = self._places(item, turn, encoding, ids)
            if start is None:
                return Problem(
                    f"{item.row.place}: the tokens of the generation prompt change when the answer follows",
                    fix="A server would make others. Take white space off the front of the assistant's message; if it "
                    "has none, this template does not fit this tokenizer.",
                )
            if end is None:
                return Problem(f"{item.row.place}: the tokenizer", f"{turn.end_token!r} as one token", "several")
            mask[start:end] = [turn.weight] * (end - start)
        # What stands behind the last trained token can't change the loss.
        length = next(place for place in range(len(mask), 0, -1) if mask[place - 1])
        return Sample(ids[:length], mask[:length], item.row.place)

    def _places(self, item: Rendered, turn: Turn, encoding: Any, ids: list[int]) -> tuple[int | None, int | None]:
        """The turn's first target and the place behind its last; None for what has no place of its own."""
        start = encoding.char_to_token(turn.start)
        if (
            start is None
            or encoding.token_to_chars(start)[0] != turn.start
            or not self._follows(item, turn, ids, start)
        ):
            return None, None
        if turn.untrained:
            start = encoding.char_to_token(turn.start + turn.untrained)
        if turn.end_token is None:
            return start, encoding.char_to_token(turn.body_end)
        end = self._end_place(turn.body_end, turn.end_token, encoding, ids)
        return start, None if end is None else end + 1

    def _end_place(self, char: int, token: str, encoding: Any, ids: list[int]) -> int | None:
        place: int | None = encoding.char_to_token(char)
        return place if place is not None and ids[place] == self.accounting.special[token] else None

    def _follows(self, item: Rendered, turn: Turn, ids: list[int], start: int) -> bool:
        """Whether the tokens in front of an answer are those that the prompt has when it stands alone.

        Only what follows the prompt's last dividing token can differ, and that is the same in nearly all rows.
        """
        from_char = max(0, turn.start - TAIL_CHARS)
        marks = [mark.start() for mark in self.dividing_text.finditer(item.text, from_char, turn.start)]
        tail = item.text[marks[-1] if marks else 0 : turn.start]
        tail_ids = self.tails.get(tail)
        if tail_ids is None:
            tail_ids = self._encodings([tail])[0].ids
            if len(tail) <= TAIL_CHARS and len(self.tails) < 1000:
                self.tails[tail] = tail_ids
        return ids[start - len(tail_ids) : start] == tail_ids


def _divides(token: Any) -> bool:
    return bool(token.special and not token.normalized and not token.single_word)
