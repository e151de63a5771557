"""All that is wrong with a run, found at once before anything is started, and without writing anything.

Each group of the run is checked on its own, so that a mistake in one does not hide those in the others. Of a group that
is wrong, the files it names and the layout are still looked at; what else depends on it is left out. No torch here: the
checks take a second or two.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from configs.schema.base import StrictModel
from configs.schema.convert import ConvertConfig
from configs.schema.data import DataConfig
from configs.schema.evaluate import EvaluateConfig
from configs.schema.export import ExportConfig
from configs.schema.launch import LaunchConfig
from configs.schema.load import RunFileError, read_run_file, validation_problems
from configs.schema.model import ModelConfig
from configs.schema.placeholders import FIELD_OF, placeholder_values
from configs.schema.run import RunConfig, layout_problems
from configs.schema.select import SelectConfig
from configs.schema.suite import Suite, load_suite
from configs.schema.train import PIPELINE_FIELDS, TrainConfig
from mcore.artifacts import Store
from mcore.backend.layout import Layout
from mcore.bridge.hf_config import read_hf_config
from mcore.data.rows import Method, load_files, load_rows, read_file
from mcore.data.sampling import DatasetSpec, parse_spec
from mcore.errors import ConfigError, InputError, Problem
from mcore.sources.resolve import ResolvedSource, resolve
from mcore.train.expert_options import balancing_problems
from mcore.train.fp8_options import fp8_problems
from mcore.train.output import checkpoint_bytes, room_problems
from mcore.train.packing_options import packing_problems
from mcore.train.recompute_options import recompute_problems
from mcore.train.tuners.readers import adapter_file_problems
from mcore.train.tuners.targets import choose_targets
from mcore.train.tuners.whole import choose_whole
from tasks.graph import ADAPTER_FILES, StagePlan, stages
from tasks.model_folder import collected, model_config_problems, model_folder_problems, served_problems

G = TypeVar("G", bound=StrictModel)

HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


@dataclass(frozen=True, slots=True)
class CheckedRun:
    """A run that can be started: its base model, its store, and its stages with their keys."""

    run: RunConfig
    source: ResolvedSource
    store: Store
    stages: tuple[StagePlan, ...]


def check_run_file(path: Path, overrides: Iterable[str] = (), *, ask_source: bool = True) -> CheckedRun:
    """Read a run file, put the overrides in, and check all of it as `check_run` does.

    Raises:
        InputError: Everything that is wrong with it.
    """
    return check_run(_read(path, overrides), ask_source=ask_source)


def check_training_file(path: Path, overrides: Iterable[str] = (), *, needs_model: bool) -> RunConfig:
    """Check as much of a run file as training alone needs.

    Args:
        path: The run file; how the result is chosen and evaluated does not count.
        overrides: As in `read_run_file`.
        needs_model: Whether training starts from the run's model, and not from a checkpoint that is there.

    Raises:
        InputError: Everything that is wrong with it.
    """
    raw = {name: value for name, value in _read(path, overrides).items() if name not in {"select", "evaluate"}}
    groups, problems = _groups(raw)
    problems += _data_problems(groups.data, groups) if groups.data is not None else []
    problems += _train_problems(groups.train) if groups.train is not None else []
    if groups.model is not None and needs_model:
        source = _source(groups.model, groups, problems)
        problems += _model_problems(source, None, groups, ask_source=False) if source is not None else []
    _raise(problems)
    assert groups.run is not None
    return groups.run


def _read(path: Path, overrides: Iterable[str]) -> dict[str, Any]:
    try:
        return read_run_file(path, overrides)
    except RunFileError as exc:
        raise ConfigError("the run can't be read", _as_problems(exc.problems)) from exc


def _raise(problems: list[Problem]) -> None:
    problems = list(dict.fromkeys(problems))  # a file that is named twice is one problem
    if problems:
        raise InputError(f"the run can't be started: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)


def check_run(raw: Mapping[str, Any] | RunConfig, *, ask_source: bool = True) -> CheckedRun:
    """Check a run.

    Args:
        raw: A run, or the mapping that is to become one.
        ask_source: Whether to ask the source of a model that is not there yet if it could be fetched.

    Raises:
        InputError: Everything that is wrong with it.
    """
    groups, problems = _groups(raw)
    if groups.data is not None:
        problems += _data_problems(groups.data, groups)
    if groups.evaluate is not None:
        problems += _evaluate_problems(groups.evaluate, groups)
    if groups.train is not None:
        problems += _train_problems(groups.train)
    if groups.select is not None:
        problems += _select_problems(groups.select, groups)
    if groups.launch is not None:
        problems += _store_problems(Path(groups.launch.store))
    store = Store(groups.launch.store if groups.launch else "store")
    plans: tuple[StagePlan, ...] = ()
    source = _source(groups.model, groups, problems) if groups.model is not None else None
    if source is not None:
        if groups.run is not None and not problems:  # all files are there, so the keys can be told
            plans = stages(groups.run, source, store)
        problems += _model_problems(source, _fetched(plans, store), groups, ask_source=ask_source)
        if not any(plan.name == "train" and store.find(plan.kind, plan.key) for plan in plans):
            problems += _room_problems(source, _fetched(plans, store), groups)
    _raise(problems)
    assert groups.run is not None and source is not None
    return CheckedRun(groups.run, source, store, plans)


@dataclass(frozen=True, slots=True)
class _Groups:
    """The groups of a run, each None if it is wrong (`evaluate` also if the run has none).

    `layout` is what is right of the layout, also if something else in `train` is wrong.
    """

    run: RunConfig | None
    model: ModelConfig | None
    convert: ConvertConfig | None
    data: DataConfig | None
    train: TrainConfig | None
    select: SelectConfig | None
    evaluate: EvaluateConfig | None
    export: ExportConfig | None
    launch: LaunchConfig | None
    layout: Layout
    method: Method


def _groups(raw: Mapping[str, Any] | RunConfig) -> tuple[_Groups, list[Problem]]:
    """Every group that is right by itself, and the findings about the others."""
    problems: list[Problem] = []
    run = raw if isinstance(raw, RunConfig) else None
    if run is None:
        try:
            run = RunConfig.model_validate(raw)
        except ValidationError as exc:
            problems = _as_problems(validation_problems(exc, RunConfig))
            groups = _single_groups(cast(Mapping[str, Any], raw))
            compared = any(finding["loc"] == () for finding in exc.errors())
            if not compared:  # pydantic leaves this out if any group is wrong
                problems += _layout_problems(cast(Mapping[str, Any], raw), groups)
            return groups, problems + _file_problems(cast(Mapping[str, Any], raw), groups)
    return (
        _Groups(
            run=run,
            model=run.model,
            convert=run.convert,
            data=run.data,
            train=run.train,
            select=run.select,
            evaluate=run.evaluate,
            export=run.export,
            launch=run.launch,
            layout=_layout({}, run.train),
            method=run.train.method,
        ),
        problems,
    )


def _single_groups(raw: Mapping[str, Any]) -> _Groups:
    train = _group(raw, "train", TrainConfig)
    given = raw.get("train")
    # Rows can be checked even if something else in `train` is wrong.
    method: Method = "pt" if isinstance(given, Mapping) and given.get("method") == "pt" else "sft"
    source = _value(raw, "model", ModelConfig, "source")
    return _Groups(
        run=None,
        model=None if source is None else ModelConfig(source=source),
        convert=_group(raw, "convert", ConvertConfig),
        data=_group(raw, "data", DataConfig),
        train=train,
        select=_group(raw, "select", SelectConfig),
        evaluate=_group(raw, "evaluate", EvaluateConfig) if raw.get("evaluate") is not None else None,
        export=_group(raw, "export", ExportConfig),
        launch=_group(raw, "launch", LaunchConfig),
        layout=_layout(raw, train),
        method=method,
    )


def _group(raw: Mapping[str, Any], name: str, model: type[G]) -> G | None:
    try:
        return model.model_validate(raw.get(name, {}))
    except ValidationError:
        return None  # said once, with the whole run


def _value(raw: Mapping[str, Any], name: str, model: type[StrictModel], field: str) -> Any:
    """A field of a group that is given and right by itself, whatever else is wrong with the group; else None."""
    group = raw.get(name)
    if not isinstance(group, Mapping) or field not in group:
        return None
    described = model.model_fields[field]
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[described.annotation, described])  # type: ignore[arg-type]
        return adapter.validate_python(group[field])
    except ValidationError:
        return None


def _layout(raw: Mapping[str, Any], train: TrainConfig | None) -> Layout:
    """The layout as far as it is known; what is not known is 1, which fits everything."""
    if train is not None:
        return Layout.of(train)
    values = {field.name: _value(raw, "train", TrainConfig, field.name) for field in dataclasses.fields(Layout)}
    known = {name: value for name, value in values.items() if value is not None}
    if known.get("pipeline_model_parallel_size", 1) == 1:  # what then makes no sense was said with `train`
        for name in PIPELINE_FIELDS:
            known.pop(name, None)
    if known.get("tensor_model_parallel_size", 1) == 1:
        known.pop("sequence_parallel", None)
    return Layout(**({"expert_tensor_parallel_size": 1} | known))


def _layout_problems(raw: Mapping[str, Any], groups: _Groups) -> list[Problem]:
    train, launch = groups.train, groups.launch
    nproc = launch.nproc_per_node if launch else _value(raw, "launch", LaunchConfig, "nproc_per_node")
    if nproc is None:
        return []
    micro, total = (
        getattr(train, field) if train else _value(raw, "train", TrainConfig, field)
        for field in ("micro_batch_size", "global_batch_size")
    )
    layout = groups.layout
    found = layout_problems(
        nproc,
        layout.model_parallel_size,
        micro,
        total,
        expert_parallel_size=layout.expert_parallel_size,
        interleaved_stages=train.interleaved_stages if train else 1,
    )
    return [Problem(text) for text in found]


def _file_problems(raw: Mapping[str, Any], groups: _Groups) -> list[Problem]:
    """Findings about the files that wrong groups name; those of groups that are right are looked at with these."""
    specs: list[str] = []
    problems: list[Problem] = []
    if groups.data is None:
        for field in ("dataset", "val_dataset"):
            specs += _value(raw, "data", DataConfig, field) or ()
    if groups.evaluate is None:
        specs += _value(raw, "evaluate", EvaluateConfig, "perplexity_dataset") or ()
        suite = _value(raw, "evaluate", EvaluateConfig, "suite")
        if suite is not None:
            problems += _suite(suite)[1]
    for spec in map(parse_spec, specs):
        problems += read_file(spec.path, groups.method)[1] if isinstance(spec, DatasetSpec) else []
    return problems


def _as_problems(findings: Iterable[tuple[str, str]]) -> list[Problem]:
    return [Problem(f"{place}: {what}") for place, what in findings]


def _source(model: ModelConfig, groups: _Groups, problems: list[Problem]) -> ResolvedSource | None:
    found: list[Problem] = []
    source = collected(found, lambda: resolve(model.source))
    folder = Path(model.source).expanduser()
    if source is None and folder.is_dir():  # not only that its config.json is wrong
        found = model_folder_problems(folder, needs_chat=groups.method == "sft")
    problems += found
    return source


def _fetched(plans: Iterable[StagePlan], store: Store) -> Path | None:
    """Folder of a remote model that the store has already."""
    for plan in plans:
        if plan.name == "fetch" and (artifact := store.find(plan.kind, plan.key)):
            return Path(artifact.path)
    return None


def _model_problems(
    source: ResolvedSource, fetched: Path | None, groups: _Groups, *, ask_source: bool
) -> list[Problem]:
    """Findings about a model and what the run wants to do with it; by its config alone if it is not there yet."""
    problems: list[Problem] = []
    divisor, layout = (groups.convert or ConvertConfig()).make_vocab_size_divisible_by, groups.layout
    folder = source.path or fetched
    if folder is not None:
        needs_chat = groups.method == "sft"
        problems += model_folder_problems(
            folder, make_vocab_size_divisible_by=divisor, layout=layout, needs_chat=needs_chat
        )
        config = collected([], lambda: read_hf_config(folder))
    else:
        config = collected(problems, source.hf_config)
        if config is not None:
            problems += model_config_problems(config, make_vocab_size_divisible_by=divisor, layout=layout)
            if ask_source:
                collected(problems, source.check_reachable)
    train = groups.train
    if config is not None and train is not None:
        found = collected([], lambda: balancing_problems(train, config))  # what it can't read was said before
        problems += found or []
        problems += collected([], lambda: recompute_problems(train, config)) or []
        # Which layers are built, and on what GPU, is known where the run starts.
        engine = "transformer_engine"
        problems += collected([], lambda: fp8_problems(train, config, backend=engine, capability=None)) or []
        if (data := groups.data) is not None:
            max_length = data.max_length
            problems += collected([], lambda: packing_problems(train, config, max_length)) or []
    if config is not None and train is not None and train.tuner_type == "lora":
        collected(problems, lambda: _lora_problems(train, config, groups))
    if config is not None and groups.evaluate is not None:
        problems += served_problems(config, groups.evaluate)
    return problems


def _lora_problems(train: TrainConfig, config: Mapping[str, Any], groups: _Groups) -> None:
    """Check which modules have adapters or learn whole, and who has to read the adapter."""
    choose_whole(train.modules_to_save, config, choose_targets(train.target_modules, config))
    if groups.export is None or groups.export.merge_lora:
        return
    if problems := adapter_file_problems(train, config, evaluates=groups.evaluate is not None):
        raise ConfigError("the adapter can't be used by itself", problems)


def _room_problems(source: ResolvedSource, fetched: Path | None, groups: _Groups) -> list[Problem]:
    """Whether the store has room for the checkpoints of training, where their size can be told."""
    train, launch, folder = groups.train, groups.launch, source.path or fetched
    divisor = (groups.convert or ConvertConfig()).make_vocab_size_divisible_by
    config = collected([], lambda: read_hf_config(folder) if folder is not None else source.hf_config())
    if train is None or launch is None or config is None:
        return []
    num_bytes = collected([], lambda: checkpoint_bytes(train, config, make_vocab_size_divisible_by=divisor))
    return room_problems(Path(launch.store), train, train_iters=train.train_iters, num_bytes=num_bytes or 0)


def _data_problems(data: DataConfig, groups: _Groups) -> list[Problem]:
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


def _evaluate_problems(evaluate: EvaluateConfig, groups: _Groups) -> list[Problem]:
    suite, problems = _suite(evaluate.suite)
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
    return problems + _interpreter_problems(evaluate.python)


def _suite(path: str) -> tuple[Suite | None, list[Problem]]:
    try:
        return load_suite(Path(path)), []
    except RunFileError as exc:
        return None, [
            Problem(f"evaluate.suite: {place if place == path else f'{path}: {place}'}: {what}")
            for place, what in exc.problems
        ]


def _interpreter_problems(python: str) -> list[Problem]:
    place, fix = f"evaluate.python: {python}", "Run `make setup`, or name the Python that vLLM is installed for."
    found = shutil.which(python)
    if found is None:
        return [Problem(place, "a Python interpreter", "none", fix)]
    try:
        answer = subprocess.run([found, "-c", HAS_VLLM], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return [Problem(place, "a Python interpreter", str(exc), fix)]
    return [Problem(place, "vLLM in its environment", "none", fix)] if answer.returncode else []


def _train_problems(train: TrainConfig) -> list[Problem]:
    problems = _adapter_problems(train)
    if importlib.util.find_spec("transformer_engine") is not None:
        return problems
    fixes = {"backend": "set backend to auto or torch"}
    return problems + [
        Problem(
            f"train.{name}: {str(getattr(train, name)).lower()}",
            "Transformer Engine to be installed",
            "not",
            f"Install it (requirements/gpu.txt), or {fixes.get(name, 'leave the field out')}.",
        )
        for name in train.fields_for_transformer_engine
    ]


def _adapter_problems(train: TrainConfig) -> list[Problem]:
    """What keeps a run with adapters from starting, whatever the model is."""
    if train.tuner_type != "lora":
        return []
    problems: list[Problem] = []
    if train.adapter_load is not None:
        folder = Path(train.adapter_load)
        problems += [
            Problem(f"train.adapter_load: {folder / name}", "a file of a PEFT adapter", "none")
            for name in ADAPTER_FILES
            if not (folder / name).is_file()
        ]
    return problems


def _select_problems(select: SelectConfig, groups: _Groups) -> list[Problem]:
    """A choice that no checkpoint will fit, which would show only when training is over."""
    data, train = groups.data, groups.train
    has_validation = data is None or bool(data.val_dataset or data.split_dataset_ratio)
    if select.strategy == "best" and not has_validation:
        fix = "Give data.val_dataset or data.split_dataset_ratio, or select by latest."
        return [Problem("select.strategy: best", "validation rows", "none", fix)]
    if select.iteration is None or train is None or train.train_iters is None:
        return []
    saved = [*range(train.save_steps, train.train_iters, train.save_steps), train.train_iters]
    # Of those that are kept, one is the best, if there is a best one; which it will be is not known yet.
    kept = saved if train.save_total_limit is None else saved[has_validation - train.save_total_limit :]
    if select.iteration in kept:
        return []
    listed = ", ".join(map(str, kept if len(kept) < 8 else [*kept[:6], "…", kept[-1]]))
    return [Problem("select.iteration", f"an iteration that is saved and kept ({listed})", str(select.iteration))]


def _store_problems(store: Path) -> list[Problem]:
    existing = next(folder for folder in (store.absolute(), *store.absolute().parents) if os.path.lexists(folder))
    if not existing.is_dir():
        return [Problem(f"launch.store: {existing}", "a folder", "a file")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [Problem(f"launch.store: {existing}", "a folder that can be written to", "no permission")]
    return []
