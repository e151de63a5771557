"""Rows and suites: everything that is wrong with the files that a run names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema.data import DataConfig
from configs.schema.evaluate import EvaluateConfig
from configs.schema.load import RunFileError
from configs.schema.placeholders import FIELD_OF, placeholder_values
from configs.schema.suite import Suite, load_suite
from mcore.data.load import load_files, load_rows, read_file
from mcore.data.sampling import DatasetSpec, parse_spec
from mcore.errors import Problem
from tasks.model_folder import collected
from tasks.preflight.groups import Groups, value_of
from tasks.preflight.vllm import interpreter_problems


def data_problems(data: DataConfig, groups: Groups) -> list[Problem]:
    """Everything that is wrong with the rows to train on."""
    problems: list[Problem] = []
    rows = collected(problems, lambda: load_rows(data, groups.method))
    if rows is not None and groups.train is not None and len(rows[0]) < groups.train.global_batch_size:
        problems.append(
            Problem(
                "data.dataset",
                f"at least train.global_batch_size rows ({groups.train.global_batch_size})",
                f"{len(rows[0])} training rows",
                "Take more rows (path#N repeats them), or a smaller batch.",
            )
        )
    return problems


def evaluate_problems(evaluate: EvaluateConfig, groups: Groups) -> list[Problem]:
    """Everything that is wrong with the suite, the held-out rows and vLLM's environment."""
    suite, problems = read_suite(evaluate.suite)
    if suite is not None and groups.data is not None:
        values = placeholder_values(groups.data.model_name, groups.data.model_author)
        problems += [
            Problem(f"evaluate.suite: {evaluate.suite} holds {{{{{name}}}}}", f"{FIELD_OF[name]} to be set", "nothing")
            for name in sorted(suite.placeholders() - values.keys())
        ]
    data = groups.data
    if data is not None:
        what = "evaluate.perplexity_dataset"
        collected(problems, lambda: load_files(evaluate.perplexity_dataset, data, groups.method, what))
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
    for spec in map(parse_spec, specs):
        problems += read_file(spec.path, groups.method)[1] if isinstance(spec, DatasetSpec) else []
    return problems
