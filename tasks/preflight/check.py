"""All that is wrong with a run, found at once before anything is started, and without writing anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema.launch import LaunchConfig
from configs.schema.load import RunFileError, read_run_file
from configs.schema.run import RunConfig
from mcore.artifacts import Store
from mcore.bridge.hf_config import read_hf_config
from mcore.errors import ConfigError, InputError, Problem
from mcore.sources.resolve import ResolvedSource
from tasks.graph import StagePlan, stages
from tasks.model_folder import collected
from tasks.preflight.data import data_problems, evaluate_problems, file_problems
from tasks.preflight.groups import as_problems, groups_of
from tasks.preflight.launchers import launcher_problems
from tasks.preflight.machine import machine_problems
from tasks.preflight.model import fetched, model_problems, source_of
from tasks.preflight.promotion import promote_problems
from tasks.preflight.store import store_problems
from tasks.preflight.training import select_problems, train_problems

LATER = {"select", "evaluate", "promote"}
"""Groups of a run that training by itself does not read."""


@dataclass(frozen=True, slots=True)
class CheckedRun:
    """A run that can be started: its base model, its store, and its stages with their keys."""

    run: RunConfig
    source: ResolvedSource
    store: Store
    stages: tuple[StagePlan, ...]


def check_run_file(
    path: Path, overrides: Iterable[str] = (), *, ask_source: bool = True, here: bool = False
) -> CheckedRun:
    """Read a run file, put the overrides in, and check all of it as `check_run` does.

    Raises:
        InputError: Everything that is wrong with it.
    """
    return check_run(_read(path, overrides), ask_source=ask_source, here=here)


def check_training_file(path: Path, overrides: Iterable[str] = (), *, needs_model: bool) -> RunConfig:
    """Check as much of a run file as training alone needs.

    Args:
        path: The run file; how the result is chosen and evaluated does not count.
        overrides: As in `read_run_file`.
        needs_model: Whether training starts from the run's model, and not from a checkpoint that is there.

    Raises:
        InputError: Everything that is wrong with it.
    """
    raw = {name: value for name, value in _read(path, overrides).items() if name not in LATER}
    groups, problems = groups_of(raw)
    problems += file_problems(raw, groups)
    problems += data_problems(groups.data, groups) if groups.data is not None else []
    problems += train_problems(groups.train) if groups.train is not None else []
    if groups.model is not None and needs_model:
        source = source_of(groups.model, groups, problems)
        problems += model_problems(source, None, groups, ask_source=False) if source is not None else []
    _raise(problems)
    assert groups.run is not None
    return groups.run


def _read(path: Path, overrides: Iterable[str]) -> dict[str, Any]:
    try:
        return read_run_file(path, overrides)
    except RunFileError as exc:
        raise ConfigError("the run can't be read", as_problems(exc.problems)) from exc


def _raise(problems: list[Problem]) -> None:
    problems = list(dict.fromkeys(problems))  # a file that is named twice is one problem
    if problems:
        raise InputError(f"the run can't be started: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)


def check_run(raw: Mapping[str, Any] | RunConfig, *, ask_source: bool = True, here: bool = False) -> CheckedRun:
    """Check a run.

    Args:
        raw: A run, or the mapping that is to become one.
        ask_source: Whether to ask the source of a model that is not there yet if it could be fetched.
        here: Whether it is about to run on this machine, so that devices, memory, versions and room count.

    Raises:
        InputError: Everything that is wrong with it.
    """
    groups, problems = groups_of(raw)
    if not isinstance(raw, RunConfig):
        problems += file_problems(raw, groups)
    if groups.data is not None:
        problems += data_problems(groups.data, groups)
    if groups.evaluate is not None:
        problems += evaluate_problems(groups.evaluate, groups)
    if groups.train is not None:
        problems += train_problems(groups.train)
    if groups.select is not None:
        problems += select_problems(groups.select, groups)
    if groups.launch is not None:
        problems += store_problems(Path(groups.launch.store))
        problems += launcher_problems(groups.launch)
    store = Store(groups.launch.store if groups.launch else "store")
    plans: tuple[StagePlan, ...] = ()
    source = source_of(groups.model, groups, problems) if groups.model is not None else None
    if source is not None:
        if groups.run is not None and not problems:  # all files are there, so the keys can be told
            plans = stages(groups.run, source, store)
            problems += _again_problems(groups.run.launch, plans)
        problems += model_problems(source, fetched(plans, store), groups, ask_source=ask_source)
        if here and groups.run is not None:
            weights = source.path or fetched(plans, store)
            config = collected([], source.hf_config if weights is None else lambda: read_hf_config(weights))
            problems += machine_problems(groups.run, plans, store, config, weights)
            problems += promote_problems(groups.run.promote)
    _raise(problems)
    assert groups.run is not None and source is not None
    return CheckedRun(groups.run, source, store, plans)


def _again_problems(launch: LaunchConfig, plans: Iterable[StagePlan]) -> list[Problem]:
    """Stages that are to be made again, which the run has none of."""
    names = [plan.name for plan in plans]
    expected = f"a stage of the run: one of {', '.join(names)}"
    return [Problem(f"launch.again.{name}", expected, "none") for name in launch.again if name not in names]
