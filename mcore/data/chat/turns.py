"""Which characters of a conversation's text are trained: proven turn by turn, never guessed from markers.

The *prompt* of an assistant's turn (all messages before it, with the generation prompt: what a server renders before
that turn) must begin the text. What follows it is trained, up to and with the special token that ends the turn. And it
must be what follows the same prompt where the conversation ends with this turn: templates that take the thoughts out of
earlier turns show there what no model is to say.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from mcore.data.chat.rendering import ChatTemplate, RefusedError
from mcore.data.rows import Message, Row
from mcore.errors import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
WAYS_OUT = (
    "Train it as one sample an answer (data.multi_turn: split), train the last answer only (data.loss_scale: "
    "last_round), or use another template."
)


@dataclass(frozen=True, slots=True)
class Turn:
    """A trained turn in a text.

    Attributes:
        index: Of its message.
        start: Character at which the answer begins.
        body_end: Character at which the special token behind it begins.
        end_token: That token, if it is trained; None where a server would end the turn with another.
        untrained: Characters of its beginning that are no target: an empty thought that is ignored.
        weight: Of its tokens in the loss.
    """

    index: int
    start: int
    body_end: int
    end_token: str | None
    untrained: int
    weight: float


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, its trained turns, and the special token that ends the last one."""

    row: Row
    text: str
    turns: tuple[Turn, ...]
    last_end: int
    last_end_token: str


class _ShownOtherwiseError(Exception):
    """The text does not show a turn as a server would see and the model would say it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


class Accounting:
    """Finds the trained turns of conversations.

    Args:
        tokenizer: Whose special tokens end turns.
        template: What makes the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self.template, self.options = template, template.options
        added = tokenizer.added_tokens_decoder.items()
        self.special = {token.content: token_id for token_id, token in added if token.special}
        self.special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.special_text = _any_of(self.special)
        ids = self.options.stop_tokens | {tokenizer.eos_token_id}
        self.served_ends = {text for text, token_id in self.special.items() if token_id in ids}

    def problems(self) -> list[Problem]:
        """Everything that keeps all conversations from being used."""
        found = self.template.problems()
        if not self.special:
            found.append(Problem("the tokenizer", "special tokens that end a turn", "none"))
        return found

    @cached_property
    def ends(self) -> re.Pattern[str]:
        """Tokens that end a turn: those that end a server's answers, and what the template puts behind a plain one."""
        question, answer = Message("user", "tell me the colour"), Message("assistant", "it is turquoise")
        try:
            text = self.template.render(Row((question, answer)))
            found = self.special_text.search(text, text.rfind(answer.content) + len(answer.content))
        except RefusedError:
            found = None
        return _any_of(self.served_ends | ({found[0]} if found else set()))

    def render(self, row: Row) -> list[Rendered] | Problem:
        """A row's text with its turns, several texts where it is split; or what is wrong with it."""
        if (inside := self._special_inside(row)) is not None:
            return inside
        weights = self._weights(row)
        if not any(weights.values()):
            return Problem(row.place, "at least one trained answer", "none")
        try:
            try:
                return [self._whole(row, weights)]
            except _ShownOtherwiseError as shown:
                if self.options.multi_turn != "split":
                    return shown.problem
            return [
                self._whole(replace(row, messages=row.messages[: index + 1]), {index: weight}, by_itself=True)
                for index, weight in weights.items()
            ]
        except _ShownOtherwiseError as shown:
            return shown.problem
        except RefusedError as exc:
            return Problem(row.place, "a conversation that the chat template takes", str(exc))

    def _weights(self, row: Row) -> dict[int, float]:
        """Weight of each trained message, by its place."""
        found: dict[int, float] = {}
        for index, message in enumerate(row.messages):
            if message.role != "assistant":
                continue
            is_last = index == len(row.messages) - 1
            trained = is_last or not self.options.trains_last_turn_only if message.loss is None else message.loss
            weight = (1.0 if message.loss_scale is None else message.loss_scale) if trained else 0.0
            # Where all tokens are trained, what is not has to be named as well.
            if weight or self.options.loss_scale == "all":
                found[index] = weight
        return found

    def _special_inside(self, row: Row) -> Problem | None:
        for index, message in enumerate(row.messages):
            calls = json.dumps(message.tool_calls, ensure_ascii=False) if message.tool_calls else ""
            for name, text in (
                ("content", message.content),
                ("reasoning_content", message.reasoning_content or ""),
                ("tool_calls", calls),
            ):
                if inside := self.special_text.search(text):
                    return _special_problem(f"{row.place}: messages[{index}].{name}", inside[0])
        inside = self.special_text.search(json.dumps(row.tools, ensure_ascii=False)) if row.tools else None
        return _special_problem(f"{row.place}: tools", inside[0]) if inside else None

    def _whole(self, row: Row, weights: dict[int, float], *, by_itself: bool = False) -> Rendered:
        text = self.template.render(row)
        # What a template no longer shows of earlier answers, a server does not see either.
        if (lost := _first_lost(row, text, but_answers=by_itself)) is not None:
            fix = "Take it out of the row, or use another template."
            raise _ShownOtherwiseError(Problem(f"{row.place}: the chat template leaves out {lost}", fix=fix))
        last = len(row.messages) - 1
        turns = [
            self._turn(row, text, index, weights.get(index, 0.0), is_last=index == last)
            for index in sorted({*weights, last})
        ]
        body_end, end_token = turns[-1].body_end, turns[-1].end_token
        assert end_token is not None  # of the last turn it always is
        return Rendered(row, text, tuple(turn for turn in turns if turn.index in weights), body_end, end_token)

    def _turn(self, row: Row, text: str, index: int, weight: float, *, is_last: bool) -> Turn:
        where = f"{row.place}: the chat template at messages[{index}]"
        prompt = self.template.render(row, index, prompt=True)
        start = len(prompt)
        if not text.startswith(prompt):
            at = _first_difference(text, prompt)
            raise _ShownOtherwiseError(
                Problem(
                    where,
                    "the text of the messages before, with the generation prompt, to begin the whole text",
                    f"{text[at : at + 30]!r} instead of {prompt[at : at + 30]!r} at character {at}",
                    f"Trained like this, the model would learn other prompts than a server makes. {WAYS_OUT}",
                )
            )
        alone = text if is_last else self.template.render(row, index + 1)
        if not alone.startswith(prompt):
            found = repr(alone[:60])
            raise _ShownOtherwiseError(Problem(where, "the answer behind the prompt that a server makes", found))
        end = self._end(row.messages[index], alone, start)
        if end is None:
            thought = _thought(row.messages[index])
            if thought not in alone[start:]:
                fix = "Take the thoughts out of the row, or use another template."
                raise _ShownOtherwiseError(
                    Problem(f"{where} leaves out the thoughts", "them all", repr(thought[:60]), fix)
                )
            found = repr(alone[start : start + 60])
            raise _ShownOtherwiseError(Problem(where, "the answer and then a special token that ends the turn", found))
        body = alone[start : end.start()]
        empty = EMPTY_THOUGHT.match(body) if self.options.ignores_empty_thoughts else None
        untrained = empty.end() if empty else 0
        if not is_last and not text.startswith(body, start) and text.startswith(body[untrained:], start):
            body, untrained = body[untrained:], 0
        body_end = start + len(body)
        if is_last:
            return Turn(index, start, body_end, end[0], untrained, weight)
        behind = self.special_text.match(text, body_end)
        if behind is None or not text.startswith(body, start):
            at = _first_difference(text[start:], body)
            raise _ShownOtherwiseError(
                Problem(
                    where,
                    "the answer as it was given, when more messages follow",
                    f"{text[start + at : start + at + 30]!r} instead of {body[at : at + 30]!r}",
                    f"Trained like this, the model would learn answers without their thoughts. {WAYS_OUT}",
                )
            )
        # gpt-oss' template ends earlier answers with a token at which no server stops: that one is not to be learnt.
        return Turn(index, start, body_end, end[0] if behind[0] == end[0] else None, untrained, weight)

    def _end(self, message: Message, text: str, start: int) -> re.Match[str] | None:
        """The special token that ends the turn which begins at `start`; None if the turn is not all there before it."""
        at = start
        calls = [call["function"]["name"] for call in message.tool_calls]
        for piece in (_thought(message), _spoken(message.content), *calls):
            at = text.find(piece, at)
            if at < 0:
                return None
            at += len(piece)
        end = self.ends.search(text, start)
        return end if end is not None and end.start() >= at else None


def _any_of(texts: set[str] | dict[str, int]) -> re.Pattern[str]:
    # Where one begins like another, the longer one is meant. With none at all nothing is found.
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _special_problem(where: str, token: str) -> Problem:
    return Problem(
        where,
        "no special token of the tokenizer",
        repr(token),
        "It would be read as a mark between turns; take it out.",
    )


def _spoken(content: str) -> str:
    # Templates of reasoning models take the thoughts out of earlier turns and trim what is left.
    return content.rpartition("</think>")[2].strip()


def _thought(message: Message) -> str:
    before, mark, _ = message.content.partition("</think>")
    return (message.reasoning_content or (before.rpartition("<think>")[2] if mark else "")).strip()


def _first_lost(row: Row, text: str, *, but_answers: bool) -> str | None:
    """What the text does not show, in words: a message or a tool. Of answers maybe only the last counts."""
    for tool in row.tools:
        if str(tool.get("function", tool).get("name")) not in text:
            return f"the tool {tool.get('function', tool).get('name')}"
    at = 0
    for index, message in enumerate(row.messages):
        if but_answers and message.role == "assistant" and index < len(row.messages) - 1:
            continue
        spoken = _spoken(message.content) if message.role == "assistant" else message.content.strip()
        pieces = [spoken, *(call["function"]["name"] for call in message.tool_calls)]
        for piece in pieces:
            # Some templates write what a tool returns as JSON.
            found = [(text.find(form, at), form) for form in (piece, json.dumps(piece, ensure_ascii=False)[1:-1])]
            place, form = min(((place, form) for place, form in found if place >= 0), default=(-1, ""))
            if place < 0:
                return f"messages[{index}] ({message.role})"
            at = place + len(form)
    return None


def _first_difference(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
