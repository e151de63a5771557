"""The Megatron-SWIFT command in what a user hands over: a line, a script, or a YAML file of arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from flows.from_swift.shell import ASSIGNMENT, ShellCommand, read_commands
from mcore.errors import ConfigError, Problem

Method = Literal["pt", "sft"]
YAML_SUFFIXES = (".yaml", ".yml", ".json")

ELSEWHERE = {
    "megatron rlhf": "Preference and reinforcement learning are not built: only pt and sft have a run file.",
    "megatron export": "Conversion is a stage of every run. By hand: `mcore-flows convert --model SRC --output DIR` "
    "for --to_mcore, `mcore-flows export --checkpoint DIR --output HF_DIR` for --to_hf, and `mcore-flows verify "
    "--hf HF_DIR --mcore DIR` for --test_convert_precision.",
    "swift": "That is no Megatron-SWIFT command: runs are made of `megatron pt` and `megatron sft`.",
}
"""What to do with commands that are no training of ours."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command that trains.

    Attributes:
        method: `pt` or `sft`.
        arguments: Value by name, with underscores, as it was given: a text, a list of texts, or what YAML made of it.
        environment: Variables that are set in front of it.
        not_read: Other commands of the script.
    """

    method: Method
    arguments: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    not_read: tuple[str, ...] = ()


def read_command(given: str, method: Method | None = None) -> Command:
    """The one `megatron pt` or `megatron sft` command of a text, a script or a YAML file.

    Args:
        given: The path of a script or YAML file, or a command line.
        method: Of a YAML file, which doesn't say whether its arguments are for pt or sft.

    Raises:
        ConfigError: There is none, or several, or it can't be read.
    """
    path = Path(given) if "\n" not in given and len(given) < 4096 else None
    if path is not None and path.suffix in YAML_SUFFIXES and not re.search(r"\s", given):
        if method is None:
            fix = f"Add --method sft or --method pt, or give the command: 'megatron sft --config {given}'."
            raise ConfigError("a file of arguments alone", [Problem(given, "to be for pt or for sft", "neither", fix)])
        return Command(method, _of_file(path))
    if path is not None and path.is_file():
        try:
            given = path.read_text()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError("the command can't be read", [Problem(given, "a script", str(exc))]) from exc
    commands, problems = read_commands(given)
    problems += [
        f"a line that begins with {command.words[0]}; let the one before it end with a backslash and nothing behind it"
        for command in commands
        if command.words[0].startswith("-")
    ]
    training = [command for command in commands if _kind(command) in {"megatron pt", "megatron sft"}]
    if len(training) != 1:
        raise _not_one(commands, len(training), given)
    (command,) = training
    if problems:
        raise ConfigError("the command can't be read", problems)
    arguments = _arguments(command.words[2:])
    others = tuple(" ".join(other.words) for other in commands if other is not command)
    return Command(cast(Method, command.words[1]), arguments, command.environment, others)


def _kind(command: ShellCommand) -> str:
    return " ".join([Path(command.words[0]).name, *command.words[1:2]])


def _not_one(commands: Sequence[ShellCommand], number: int, given: str) -> ConfigError:
    if number > 1:
        fix = "Give each by itself, and each run file a name of its own (--output)."
        return ConfigError("one run file at a time", [Problem("what was given", "one command", str(number), fix)])
    for command in commands:
        kind = _kind(command)
        if "export" in kind or "--to_mcore" in command.words or "--to_hf" in command.words:
            kind = "megatron export"
        advice = ELSEWHERE.get(kind) or ELSEWHERE.get(kind.partition(" ")[0])
        if advice:
            found = " ".join(command.words[:2])
            return ConfigError(
                "no training", [Problem(found, "megatron pt or megatron sft", "another command", advice)]
            )
    found = given.strip()[:60] or "nothing"
    fix = "Quote the whole command, or name a script or YAML file that is there."
    return ConfigError(
        "no command to translate", [Problem("what was given", "megatron pt … or megatron sft …", found, fix)]
    )


def _arguments(words: Iterable[str]) -> dict[str, Any]:
    """Values by name. A name without a value is a switch; of one that comes twice the last counts, as there.

    Raises:
        ConfigError: Something stands where a name should.
    """
    found: dict[str, list[str]] = {}
    files: list[str] = []
    problems: list[Problem] = []
    name = ""
    for word in words:
        if option := re.fullmatch(r"--([A-Za-z][\w-]*)(?:=(.*))?", word, re.DOTALL):
            name = option[1].replace("-", "_")
            found[name] = [] if option[2] is None else [option[2]]
        elif name:
            found[name].append(word)
        elif Path(word).suffix in YAML_SUFFIXES:
            files.append(word)
        else:
            hint = "Variables go in front of the command." if ASSIGNMENT.fullmatch(word) else "Names begin with --."
            problems.append(Problem(word, "an argument's name", "a word without one", hint))
    if problems:
        raise ConfigError("the command can't be read", problems)
    arguments: dict[str, Any] = {}
    for file in [*files, *found.pop("config", [])]:
        arguments |= _of_file(Path(file))
    for name, values in found.items():  # what the command line says counts more than what a file says
        arguments[name] = True if not values else values[0] if len(values) == 1 else values
    return arguments


def _of_file(path: Path) -> dict[str, Any]:
    """The arguments of a YAML file; nested mappings are values, as `megatron_extra_kwargs` takes them.

    Raises:
        ConfigError: It can't be read, or holds no mapping.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as exc:
        raise ConfigError("the arguments can't be read", [Problem(str(path), found=exc.strerror or str(exc))]) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError("the arguments can't be read", [Problem(str(path), "YAML", str(exc))]) from exc
    if not isinstance(found, dict):
        raise ConfigError("the arguments can't be read", [Problem(str(path), "a mapping", type(found).__name__)])
    return {str(name).replace("-", "_"): value for name, value in found.items()}
