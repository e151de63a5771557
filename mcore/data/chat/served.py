"""The chat template that an exported model is served by: what a run trained with is in it, and nobody has to pass it.

A server that is given no system message shows the run's, one that is given its own shows that, and switches that a
request does not set are as in training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore.errors import Problem, SourceError

TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
CONFIG_FILES = ("tokenizer_config.json", "chat_template.json")
"""Files that may hold a template under `chat_template`: a text, or a list of `{"name", "template"}`."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a run trained with that a server has to do the same.

    Attributes:
        system: The run's `data.system`, its placeholders filled.
        enable_thinking: The run's `data.enable_thinking`.
        template: Text of the run's `data.template`; it takes the place of all that there are.
    """

    system: str | None = None
    enable_thinking: bool | None = None
    template: str | None = None


def prelude(system: str | None, enable_thinking: bool | None) -> str:
    """Jinja to put before a template; empty if a run asks for nothing.

    It is a line of its own: the newline behind a block is taken out wherever chat templates are rendered
    (`trim_blocks`), so that the template behind it begins as it did.
    """
    text = ""
    if system is not None:
        # A JSON string is a Jinja string, escapes included.
        message = f'{{"role": "system", "content": {json.dumps(system, ensure_ascii=False)}}}'
        given = "messages and messages[0]['role'] in ['system', 'developer']"
        text += f"{{% set messages = messages if {given} else [{message}] + messages %}}\n"
    if enable_thinking is not None:
        default = str(enable_thinking).lower()
        text += f"{{% set enable_thinking = enable_thinking if enable_thinking is defined else {default} %}}\n"
    return text


def write_served_template(folder: Path, served: Served) -> list[str]:
    """Change the templates of a Hugging Face folder to what a run trained with.

    Args:
        folder: With the tokenizer's files.
        served: What that is.

    Returns:
        Names of the files that were written.

    Raises:
        SourceError: There is no template to change.
    """
    before = prelude(served.system, served.enable_thinking)
    if served.template is not None:
        for path in (folder / MORE_TEMPLATES).glob("*.jinja"):
            path.unlink()
        if (folder / MORE_TEMPLATES).is_dir():
            (folder / MORE_TEMPLATES).rmdir()
        changed = [name for name in CONFIG_FILES if _edit(folder / name, None)]
        (folder / TEMPLATE_FILE).write_text(before + served.template, encoding="utf-8")
        return [*changed, TEMPLATE_FILE]
    if not before:
        return []
    changed = [name for name in CONFIG_FILES if _edit(folder / name, before)]
    for path in sorted([folder / TEMPLATE_FILE, *(folder / MORE_TEMPLATES).glob("*.jinja")]):
        if path.is_file():
            path.write_text(before + path.read_text(encoding="utf-8"), encoding="utf-8")
            changed.append(str(path.relative_to(folder)))
    if not changed:
        problem = Problem(str(folder), "a chat template", "none", "Leave data.system out, or name a data.template.")
        raise SourceError("the run's system message can't be written into the model", [problem])
    return changed


def _edit(path: Path, before: str | None) -> bool:
    """Put a text before the templates of a JSON file, or take them out with None; whether there were any."""
    if not path.is_file():
        return False
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found = content.get("chat_template")
    if not found:
        return False
    if before is None:
        del content["chat_template"]
    elif isinstance(found, str):
        content["chat_template"] = before + found
    else:
        content["chat_template"] = [{**named, "template": before + named["template"]} for named in found]
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return True
