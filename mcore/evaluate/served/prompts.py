"""Real prompts of a run: as training has them in tokens, and as whoever serves the model is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema.data import DataConfig
from mcore.data.chat.options import options_of
from mcore.data.chat.rendering import ChatTemplate, as_templates_read
from mcore.data.chat.turns import Accounting
from mcore.data.rows import Method, Row
from mcore.data.sources.source import Source, open_source, read
from mcore.data.template import encode_rows, load_tokenizer
from mcore.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_A_PLACE = 64
"""Rows that are looked at in one place of a source, to find some that can be used."""


@dataclass(frozen=True, slots=True)
class ServedPrompt:
    """One answer of one row.

    Attributes:
        place: The row, and the number of the answer's message.
        token_ids: The whole sample, as training has it, up to the answer's end.
        prompt_token_ids: Its part in front of the answer; of a text without turns empty.
        messages: What a server is asked in its place; of a text without turns empty.
        tools: Tools that the server is told of.
        chat_template_kwargs: What the server is to hand to the template.
        chat_template: Template that the server is to use in place of the folder's own; None for that.
    """

    place: str
    token_ids: list[int]
    prompt_token_ids: list[int] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None


def served_prompts(
    data: DataConfig, method: Method, hf: Path, *, num_prompts: int, max_tokens: int, template_is_served: bool
) -> list[ServedPrompt]:
    """Answers of a run's rows, evenly from all its sources, from their beginnings and their middles.

    Args:
        data: The run's `data`.
        method: How it trained.
        hf: Folder whose tokenizer and template training used: the base model's.
        num_prompts: How many, at most.
        max_tokens: Tokens: longer samples are passed over.
        template_is_served: Whether the served folder's template does by itself what the run says of system message,
            `enable_thinking` and template; if not (an adapter has no template), the server is told.

    Raises:
        DataError: There is no row that can be used, or the tokenizer can't.
    """
    tokenizer = load_tokenizer(hf)
    problems: list[Problem] = []
    found: list[list[ServedPrompt]] = []
    sources = [open_source(entry, data) for entry in (*data.dataset, *data.val_dataset)]
    asked_of = data.model_copy(update={"system": None}) if template_is_served else data
    as_asked = [open_source(entry, asked_of) for entry in (*data.dataset, *data.val_dataset)]
    wanted = -(-num_prompts // (2 * len(sources)))  # from each place of each source, rounded up
    reader = _Text(tokenizer) if method == "pt" else _Chat(tokenizer, data, hf, is_told=not template_is_served)
    for trained, asked in zip(sources, as_asked, strict=True):
        for start in sorted({0, trained.num_rows // 2}):
            prompts = _in_place(trained, asked, method, start, reader, problems)
            found.append([prompt for prompt, _ in zip(_short(prompts, max_tokens), range(wanted), strict=False)])
    chosen: list[ServedPrompt] = []
    for place in range(wanted):
        chosen += [prompts[place] for prompts in found if place < len(prompts)]
    if not chosen:
        raise DataError("no row of the run can be asked of the served model", problems or ["all rows are too long"])
    return chosen[:num_prompts]


def _short(prompts: Iterator[ServedPrompt], max_tokens: int) -> Iterator[ServedPrompt]:
    return (prompt for prompt in prompts if len(prompt.token_ids) <= max_tokens)


def _in_place(
    trained: Source, asked: Source, method: Method, start: int, reader: _Chat | _Text, problems: list[Problem]
) -> Iterator[ServedPrompt]:
    stop = min(start + ROWS_AT_A_PLACE, trained.num_rows)
    pairs = zip(read(trained, method, start, stop), read(asked, method, start, stop), strict=True)
    for row, asked_row in pairs:
        if not isinstance(row, Row) or not isinstance(asked_row, Row):
            continue  # a broken row: the preparation has counted it
        for item in reader.prompts(row, asked_row):
            if isinstance(item, ServedPrompt):
                yield item
            else:
                problems.append(item)


class _Text:
    """Of documents there are no prompts; their probabilities are compared."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def prompts(self, row: Row, asked: Row) -> Iterator[ServedPrompt | Problem]:
        samples, problems = encode_rows([row], self.tokenizer, "pt")
        yield from problems
        for sample in samples:
            yield ServedPrompt(row.place, list(sample.token_ids))


class _Chat:
    """The last trained answer of each text that a row becomes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, hf: Path, *, is_told: bool) -> None:
        self.is_told = is_told
        self.tokenizer = tokenizer
        self.options = options_of(data, hf)
        self.template = ChatTemplate(tokenizer, self.options)
        self.accounting = Accounting(tokenizer, self.template)

    def prompts(self, row: Row, asked: Row) -> Iterator[ServedPrompt | Problem]:
        samples, problems = encode_rows([row], self.tokenizer, "sft", options=self.options)
        yield from problems
        if problems:
            return
        # A system message in front of the row that was trained stands in no row that is asked without it.
        offset = len(row.messages) - len(asked.messages)
        texts = self.accounting.render(row)
        assert not isinstance(texts, Problem), "encode_rows would have told"
        for item, sample in zip(texts, samples, strict=True):
            turn = item.turns[-1]
            ids = self.tokenizer(item.text[: turn.start], add_special_tokens=False)["input_ids"]
            # These are the sample's own first tokens: encode_rows has made sure, or dropped the row.
            kwargs = dict(row.chat_template_kwargs)
            if self.is_told and self.options.enable_thinking is not None:
                kwargs.setdefault("enable_thinking", self.options.enable_thinking)
            messages: Sequence[dict[str, Any]] = as_templates_read(
                asked.messages[: turn.index - offset], self.template.source()
            )
            yield ServedPrompt(
                f"{row.place}, message {turn.index}",
                list(sample.token_ids),
                list(ids),
                list(messages),
                list(row.tools),
                kwargs,
                self.options.template if self.is_told else None,
            )
