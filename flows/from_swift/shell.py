"""As much of a shell's language as commands in scripts are written in.

Words, quotes, variables, comments, redirections. Nothing is executed; what would have to be, such as `$(…)`, is a
problem.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_SPACE = re.compile(r"(?:[ \t\r]|\\\r?\n)+")
_COMMENT = re.compile(r"#[^\n]*")
_REDIRECTION = re.compile(r"(?:\d*|&)(?:>>|>&|<&|[<>])[ \t]*(?:&?\d+(?=\s|$)|(?=\S))")
_END = re.compile(r"\n|;|\|\|?|&&?")
_PIECE = re.compile(
    r"""'(?P<literal>[^']*)'|"(?P<quoted>(?:\\.|[^"\\])*)"|\\(?P<escaped>.)|(?P<plain>(?:[^\s'"\\;|&<>$`]|\$)+)""",
    re.DOTALL,
)
_VARIABLE = re.compile(r"\$(?:(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)(?::?-(?P<default>[^}]*))?\})")


@dataclass(frozen=True, slots=True)
class ShellCommand:
    """One command: the variables that are set in front of it and its words."""

    environment: Mapping[str, str]
    words: tuple[str, ...]


def read_commands(text: str) -> tuple[list[ShellCommand], list[str]]:
    """All commands of a script or line in their order, and what is wrong with it.

    Variables that the text sets (`A=b`, `export A=b`) count for what follows; others have no value.
    """
    commands: list[ShellCommand] = []
    problems: list[str] = []
    variables: dict[str, str] = {}
    exported: dict[str, str] = {}
    words: list[str] = []
    position = 0

    def finish() -> None:
        is_export = words[:1] == ["export"]
        given = words[is_export:]
        own: dict[str, str] = {}
        while given and (found := ASSIGNMENT.fullmatch(given[0])):
            own[found[1]] = found[2]
            given = given[1:]
        if given:
            commands.append(ShellCommand({**exported, **own}, tuple(given)))
        else:
            variables.update(own)
            exported.update(own if is_export else {name: own[name] for name in own if name in exported})
        words.clear()

    while position < len(text):
        if skipped := _SPACE.match(text, position) or _COMMENT.match(text, position):
            position = skipped.end()
        elif aside := _REDIRECTION.match(text, position):
            position = aside.end()
            if not aside[0][-1].isdigit():  # its file is the next word
                _, position = _word(text, position, variables, problems)
        elif end := _END.match(text, position):
            finish()
            position = end.end()
        else:
            word, position = _word(text, position, variables, problems)
            words.append(word)
    finish()
    return commands, list(dict.fromkeys(problems))


def _word(text: str, position: int, variables: Mapping[str, str], problems: list[str]) -> tuple[str, int]:
    """The word at a place, with its variables replaced, and the place behind it."""
    start, parts = position, []
    while piece := _PIECE.match(text, position):
        position = piece.end()
        if piece["literal"] is not None:
            parts.append(piece["literal"])
        elif piece["escaped"] is not None:
            parts.append("" if piece["escaped"] == "\n" else piece["escaped"])
        else:
            raw = piece["plain"] if piece["quoted"] is None else re.sub(r'\\(["\\$`]|\n)', _unescaped, piece["quoted"])
            parts.append(_filled(raw, variables, problems))
    if position == start or (position < len(text) and text[position] in "'\"`"):
        what = (
            "a command in backticks" if text[position] == "`" else f"a quote that does not end: {text[position:][:40]}"
        )
        problems.append(f"{what}; write what it stands for")
        return "".join(parts), len(text)
    return "".join(parts), position


def _unescaped(match: re.Match[str]) -> str:
    return "" if match[1] == "\n" else match[1]


def _filled(text: str, variables: Mapping[str, str], problems: list[str]) -> str:
    if "$(" in text or "`" in text:
        problems.append(f"{text}: what a command prints is not known; write what it stands for")
        return text

    def value(match: re.Match[str]) -> str:
        name = match["name"] or match["braced"]
        found = variables.get(name) or match["default"]
        if found is None:
            problems.append(f"${name}: has no value in what was given; write it in, or put {name}=… in front")
        return found or ""

    return _VARIABLE.sub(value, text)
