"""Rows of jsonl files: read, checked, filled and drawn, without torch and without a tokenizer.

A row is one JSON object a line: `{"messages": [{"role": …, "content": …}, …]}` for SFT, `{"text": …}` for PT. Rows of
other shapes become `messages` first (`mcore.data.formats`). All that is wrong with all files of a run is found before
anything starts; no row is ever left out quietly.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from configs.schema.data import DataConfig
from configs.schema.placeholders import FIELD_OF, fill_placeholders, placeholder_values, placeholders_in
from mcore.data.formats.conversations import to_messages
from mcore.data.sampling import DatasetSpec, parse_spec, sample, split
from mcore.errors import DataError, Problem

Method = Literal["pt", "sft"]

MAX_LISTED = 50
"""Problems that an error lists; the others are counted."""

MEANINGFUL_COLUMNS = ("role", "content", "system", "history", "tools", "images", "videos", "audios", "objects")
"""Columns beside `messages` that would belong to the training text. Rows that use them are refused, because ignoring
them would train something else; all other columns are ignored."""

SFT_FIX = 'Write the row as {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}.'
PT_FIX = 'Write the row as {"text": …}.'


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One checked row: `messages` for SFT or `text` for PT. Rows with the same content are equal, wherever they are.

    `place` is `file:line`.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    place: str = field(default="", compare=False)

    def filled(self, values: Mapping[str, str]) -> Row:
        """The row with its placeholders replaced.

        Raises:
            KeyError: A placeholder has no value.
        """
        messages = tuple(Message(turn.role, fill_placeholders(turn.content, values)) for turn in self.messages)
        return Row(messages, fill_placeholders(self.text, values), self.place)

    def placeholders(self) -> set[str]:
        """Names of the placeholders that the row holds."""
        texts = (self.text, *(turn.content for turn in self.messages))
        return {name for text in texts for name in placeholders_in(text)}


def _speaks(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"holds half a character (a lone surrogate) at {exc.start}") from exc
    return text


Text = Annotated[str, AfterValidator(_speaks)]


class _MessageModel(BaseModel):
    # A key such as tool_calls, name or loss would change what is trained, so nothing beside these two is accepted.
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: Text


class _SftRow(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    messages: list[_MessageModel]

    @model_validator(mode="after")
    def _turns_alternate(self) -> Self:
        roles = [message.role for message in self.messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns:
            raise ValueError("messages hold no turn")
        expected = ["user", "assistant"] * (len(turns) // 2 + 1)
        wrong = next((index for index, role in enumerate(turns) if role != expected[index]), None)
        if wrong is not None:
            at = wrong + len(roles) - len(turns)
            raise ValueError(
                f"messages[{at}] is from {turns[wrong]} where {expected[wrong]} must speak "
                "(an optional system message, then user and assistant in turn)"
            )
        if turns[-1] != "assistant":
            raise ValueError("the last message must be the assistant's")
        return self


class _PtRow(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    text: Text


def load_rows(config: DataConfig, method: Method) -> tuple[list[Row], list[Row]]:
    """Training and validation rows of a run, checked, filled, drawn and split.

    Training rows come in the order of the files; the order of training is made later (`mcore.data.dataset`).

    Raises:
        DataError: Everything that is wrong with any file or row of the run.
    """
    problems: list[Problem] = []
    if not config.dataset:
        problems.append(Problem("data.dataset", "at least one file", "none"))
    if config.val_dataset and config.split_dataset_ratio:
        problems.append(Problem("data", "val_dataset or split_dataset_ratio", "both", "Leave one of them out."))
    train = _read_specs(config.dataset, config, method, "data.dataset", problems)
    validation = _read_specs(config.val_dataset, config, method, "data.val_dataset", problems)
    if config.split_dataset_ratio and not problems:
        train, validation = split(
            train, config.split_dataset_ratio, seed=config.data_seed, shuffle=config.dataset_shuffle
        )
        if not train or not validation:
            problems.append(
                Problem("data.split_dataset_ratio", "rows on both sides", f"{len(train)} and {len(validation)}")
            )
    raise_problems("the data can't be used", problems)
    return train, validation


def load_files(specs: Iterable[str], config: DataConfig, method: Method, what: str) -> list[Row]:
    """Rows of other files with the same placeholders, system message and seed, such as those for perplexity.

    Args:
        specs: `path` or `path#N`.
        config: Gives placeholders, system message and seed; its own files are not read.
        method: Which kind of row.
        what: Name of the field that holds the specs, for messages.

    Raises:
        DataError: Everything that is wrong with any of them.
    """
    problems: list[Problem] = []
    rows = _read_specs(specs, config, method, what, problems)
    raise_problems("the data can't be used", problems)
    return rows


def raise_problems(summary: str, problems: list[Problem]) -> None:
    """Raise the problems together, the first `MAX_LISTED` of them listed and the others counted; none, no error.

    Raises:
        DataError: There are problems.
    """
    if len(problems) > MAX_LISTED:
        problems = [*problems[:MAX_LISTED], Problem(f"and {len(problems) - MAX_LISTED} more problems")]
    if problems:
        raise DataError(summary, problems)


def read_file(path: Path, method: Method) -> tuple[list[Row], list[Problem]]:
    """Rows of one file and all that is wrong with it. Lines end at line feeds only, as JSON Lines has it."""
    rows: list[Row] = []
    problems: list[Problem] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                found = _read_line(line, method, f"{path}:{number}")
                rows += [found] if isinstance(found, Row) else []
                problems += found if isinstance(found, list) else []
    except OSError as exc:
        return [], [Problem(str(path), "a jsonl file", exc.strerror or type(exc).__name__)]
    if not rows and not problems:
        problems.append(Problem(str(path), "at least one row", "an empty file"))
    return rows, problems


def _read_line(line: bytes, method: Method, place: str) -> Row | list[Problem]:
    if not line.strip():
        return [Problem(place, "one JSON object", "an empty line", "Remove the line.")]
    try:
        data = json.loads(line.rstrip(b"\r\n").decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as exc:
        return [Problem(place, "UTF-8", f"byte 0x{line[exc.start]:02x} at {exc.start}")]
    except (ValueError, RecursionError) as exc:
        return [Problem(place, "one JSON object", str(exc))]
    if not isinstance(data, dict):
        return [Problem(place, "one JSON object", type(data).__name__)]
    try:
        if method == "pt":
            return Row(text=_PtRow.model_validate(data).text, place=place)
        try:
            data = to_messages(data)
        except ValueError as exc:
            return [Problem(place, "columns of one shape of rows", str(exc), SFT_FIX)]
        problems = [
            Problem(place, f"no column {name!r} beside messages", _short(data[name]), SFT_FIX)
            for name in MEANINGFUL_COLUMNS
            if data.get(name)
        ]
        messages = _SftRow.model_validate(data).messages
    except ValidationError as exc:
        return [_as_problem(finding, place, data, PT_FIX if method == "pt" else SFT_FIX) for finding in exc.errors()]
    return problems or Row(messages=tuple(Message(turn.role, turn.content) for turn in messages), place=place)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return data


def _as_problem(finding: Any, place: str, data: dict[str, Any], fix: str) -> Problem:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in finding["loc"]).lstrip(".")
    subject = f"{place}: {where}" if where else place
    if finding["type"] == "missing" and len(finding["loc"]) == 1:
        return Problem(subject, "this column", f"only {', '.join(sorted(data)) or 'no column'}", fix)
    if finding["type"] == "missing":
        return Problem(subject, "this key", "none", fix)
    if finding["type"] == "extra_forbidden":
        return Problem(subject, "no key but role and content", _short(finding["input"]))
    if finding["type"] == "value_error":
        return Problem(f"{subject}: {finding['msg'].removeprefix('Value error, ')}")
    return Problem(subject, finding["msg"].removeprefix("Input should be "), _short(finding["input"]))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _read_specs(
    specs: Iterable[str], config: DataConfig, method: Method, what: str, problems: list[Problem]
) -> list[Row]:
    values = placeholder_values(config.model_name, config.model_author)
    files: dict[Path, list[Row]] = {}
    drawn: list[Row] = []
    for index, text in enumerate(specs):
        spec = parse_spec(text)
        if not isinstance(spec, DatasetSpec):
            problems.append(Problem(f"{what}[{index}] {text!r}", found=spec))
            continue
        if spec.path not in files:  # a file that is named twice is read and reported once
            rows, found = read_file(spec.path, method)
            found += _unfilled(rows, values, spec.path)
            problems += found
            files[spec.path] = [] if found else [_with_system(row, config.system).filled(values) for row in rows]
        if files[spec.path]:
            key = f"{config.data_seed}:{what}:{index}"
            drawn += sample(files[spec.path], spec.num_rows, key=key, shuffle=config.dataset_shuffle)
    if config.system is not None:
        problems += [
            Problem(f"data.system holds {{{{{name}}}}}", f"{FIELD_OF[name]} to be set")
            for name in sorted(placeholders_in(config.system) - values.keys())
            if what == "data.dataset"
        ]
    return drawn


def _with_system(row: Row, system: str | None) -> Row:
    if system is None or not row.messages or row.messages[0].role == "system":
        return row
    return replace(row, messages=(Message("system", system), *row.messages))


def _unfilled(rows: list[Row], values: Mapping[str, str], path: Path) -> list[Problem]:
    places: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for name in row.placeholders() - values.keys():
            places[name].append(row.place)
    return [
        Problem(
            f"{path}: {len(found)} rows hold {{{{{name}}}}} (first: line {found[0].rpartition(':')[2]})",
            f"{FIELD_OF[name]} to be set",
            "nothing",
        )
        for name, found in sorted(places.items())
    ]
