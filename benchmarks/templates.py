"""Rows a second from conversations to ids and masks, beside the template and the tokenizer alone.

    python benchmarks/templates.py FOLDER [--rows N]     FOLDER: a tokenizer's, as models/templates/qwen3

The bare way renders each conversation once and tokenises the texts in batches; it has no masks. Ours proves each
answer's prompt, too.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

from mcore.data.chat.options import TemplateOptions, stop_tokens
from mcore.data.rows import Message, Row
from mcore.data.template import ROWS_AT_ONCE, encode_rows, load_tokenizer
from mcore.progress import say

WORDS = ("the", "small", "model", "river", "answers", "many", "questions", "about", "why", "and", "12", "3.5", "turns")


def rows(number: int, turns: int, words: int) -> list[Row]:
    """Conversations of so many turns, with answers of about so many words."""
    draw = random.Random(7)

    def text(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(most // 2, most)))

    found = []
    for row in range(number):
        messages = []
        for _ in range(turns):
            messages += [Message("user", text(words // 3)), Message("assistant", text(words))]
        found.append(Row(tuple(messages), place=f"f:{row}"))
    return found


def rate(number: int, work: Callable[[], object]) -> float:
    """Rows a second, the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return number / best


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.folder)
    options = TemplateOptions(stop_tokens=frozenset(stop_tokens(arguments.folder)), loss_scale="ignore_empty_think")
    say("| turns | words an answer | bare, rows/s | ours, rows/s | share |\n|---|---|---|---|---|")
    for turns, words in ((1, 60), (1, 300), (3, 100), (8, 60)):
        some = rows(arguments.rows, turns, words)
        plain = [[message.for_template() for message in row.messages] for row in some]

        def bare(plain: list[list[dict[str, str]]] = plain) -> None:
            for start in range(0, len(plain), ROWS_AT_ONCE):
                batch = plain[start : start + ROWS_AT_ONCE]
                texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in batch]
                tokenizer(texts, add_special_tokens=False)

        def ours(some: list[Row] = some) -> None:
            samples, problems = encode_rows(some, tokenizer, "sft", options=options)
            assert len(samples) == len(some) and not problems

        one, other = rate(len(some), bare), rate(len(some), ours)
        say(f"| {turns} | {words} | {one:.0f} | {other:.0f} | {other / one:.2f} |")


if __name__ == "__main__":
    main()
