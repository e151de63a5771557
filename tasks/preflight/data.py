"""Rows and suites: what is wrong with the files that a run names, as far as a look at their beginning tells.

All rows are read by the stage `prepare`, which fails with the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema.data import DataConfig
from configs.schema.evaluate import EvaluateConfig
from configs.schema.load import RunFileError
from configs.schema.placeholders import FIELD_OF, placeholder_values
from configs.schema.suite import Suite, load_suite
from mcore.data.chat.options import read_template
from mcore.data.prepare.look import look, look_at
from mcore.errors import DataError, Problem
from tasks.preflight.groups import Groups, value_of
from tasks.preflight.vllm import interpreter_problems


def data_problems(data: DataConfig, groups: Groups) -> list[Problem]:
    """What is wrong with the rows to train on: the first ones of each source, and how many there are."""
    num_rows, problems = look(data, groups.method)
    problems += _template_problems(data)
    if not problems and groups.train is not None and num_rows < groups.train.global_batch_size:
        problems.append(
            Problem(
                "data.dataset",
                f"at least train.global_batch_size rows ({groups.train.global_batch_size})",
                f"{num_rows} training rows",
                "Take more rows (path#N repeats them), or a smaller batch.",
            )
        )
    return problems


def _template_problems(data: DataConfig) -> list[Problem]:
    """Whether the run's template can be read; what it makes of rows is seen where they are prepared."""
    if data.template is None:
        return []
    try:
        read_template(Path(data.template))
    except DataError as error:
        return list(error.problems)
    return []


def evaluate_problems(evaluate: EvaluateConfig, groups: Groups) -> list[Problem]:
    """What is wrong with the suite, the first held-out rows and vLLM's environment."""
    suite, problems = read_suite(evaluate.suite)
    if suite is not None and groups.data is not None:
        values = placeholder_values(groups.data.model_name, groups.data.model_author)
        problems += [
            Problem(f"evaluate.suite: {evaluate.suite} holds {{{{{name}}}}}", f"{FIELD_OF[name]} to be set", "nothing")
            for name in sorted(suite.placeholders() - values.keys())
        ]
    data = groups.data
    if data is not None:
        complete = data.model_copy(update={"max_dropped_rows": 0})  # whose perplexity would be compared?
        problems += look_at(evaluate.perplexity_dataset, complete, groups.method, "evaluate.perplexity_dataset")[1]
    return problems + interpreter_problems(evaluate.python)


def read_suite(path: str) -> tuple[Suite | None, list[Problem]]:
    """A suite, if it can be read, and what is wrong with it."""
    try:
        return load_suite(Path(path)), []
    except RunFileError as exc:
        return None, [
            Problem(f"evaluate.suite: {place if place == path else f'{path}: {place}'}: {what}")
            for place, what in exc.problems
        ]


def file_problems(raw: Mapping[str, Any], groups: Groups) -> list[Problem]:
    """Findings about the files that wrong groups name; those of groups that are right are looked at with these."""
    specs: list[str] = []
    problems: list[Problem] = []
    if groups.data is None:
        for field in ("dataset", "val_dataset"):
            specs += value_of(raw, "data", DataConfig, field) or ()
    if groups.evaluate is None:
        specs += value_of(raw, "evaluate", EvaluateConfig, "perplexity_dataset") or ()
        suite = value_of(raw, "evaluate", EvaluateConfig, "suite")
        if suite is not None:
            problems += read_suite(suite)[1]
    # What can't be read is looked at by itself: placeholders stand for themselves.
    plain = DataConfig(dataset=(), model_name="{{NAME}}", model_author="{{AUTHOR}}")
    return problems + look_at(specs, plain, groups.method, "dataset")[1]
