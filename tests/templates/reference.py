"""Token ids and trained tokens computed another way: plain Jinja, the tokenizers library, turns found by their marks.

Nothing of `mcore` and nothing of transformers is used, and no prompt is rendered: what is trained is read off the text,
by the marks that each family puts around an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

DATE = datetime(2024, 7, 26)

CHATML = r"<\|im_start\|>assistant\n(?P<said>.*?)(?P<end><\|im_end\|>)"
ANSWERS = {
    "smollm2": CHATML,
    "qwen3": CHATML,
    "llama3": r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(?P<said>.*?)(?P<end><\|eot_id\|>)",
    "deepseek_v3": r"<｜Assistant｜>(?P<said>.*?)(?P<end><｜end▁of▁sentence｜>)",
    "gemma3": r"<start_of_turn>model\n(?P<said>.*?)(?P<end><end_of_turn>)",
    # Thoughts and what follows them are one answer, which ends where a server stops or, in history, with <|end|>.
    "gptoss": r"<\|start\|>assistant(?P<said>(?:<\|channel\|>analysis<\|message\|>(?:(?!<\|end\|>).)*<\|end\|>"
    r"<\|start\|>assistant)?(?:(?!<\|end\|>|<\|return\|>|<\|call\|>).)*)(?P<end><\|return\|>|<\|call\|>|<\|end\|>)",
}
NO_THOUGHT = "<think>\n\n</think>\n\n"
NOT_TRAINED = {"gptoss": "<|end|>"}
"""What stands behind earlier answers, and no server stops at."""


@dataclass(frozen=True)
class Answer:
    """An answer in a text: what the model says, the mark behind it, and where both lie."""

    said: str
    end: str
    start: int
    stop: int


class Reference:
    """One tokenizer's folder.

    Args:
        name: Of the tokenizer.
        folder: With `tokenizer.json` and its template.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        template = folder / "chat_template.jinja"
        self.template = template.read_text() if template.exists() else config["chat_template"]
        self.marks = {
            mark: token["content"] if isinstance(token := config.get(mark), dict) else token
            for mark in ("bos_token", "eos_token", "pad_token", "unk_token")
            if config.get(mark) is not None
        }

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), **options: Any) -> str:
        """The text; whatever is wrong with the conversation is raised."""
        arguments = {"messages": list(messages), "tools": list(tools) or None, **self.marks, **options}
        return compiled(self.template).render(**{"add_generation_prompt": False, **arguments})

    def answers(self, text: str, *, without_thinking: bool) -> list[Answer]:
        """The answers in a text, in order; a prompt that says not to think has an empty thought at its end."""
        found = []
        for match in re.finditer(ANSWERS[self.name], text, re.DOTALL):
            start, said = match.start("said"), match["said"]
            if without_thinking and said.startswith(NO_THOUGHT):
                start += len(NO_THOUGHT)
            found.append(Answer(said, match["end"], start, match.end("end")))
        return found

    def encode(self, text: str, trained: Sequence[Answer]) -> tuple[list[int], list[float]]:
        """Ids up to the last trained token, and which of them are trained."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        spans = [
            (one.start, one.stop - (len(one.end) if one.end == NOT_TRAINED.get(self.name) else 0)) for one in trained
        ]
        mask = [float(any(a <= start and end <= b and start < b for a, b in spans)) for start, end in encoding.offsets]
        length = max(index for index, weight in enumerate(mask) if weight) + 1
        return encoding.ids[:length], mask[:length]


@cache
def compiled(template: str) -> jinja2.Template:
    """The template in an environment as the Hugging Face documentation describes it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["strftime_now"] = DATE.strftime
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
