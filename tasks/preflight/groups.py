"""The groups of a run, each checked by itself, so that a mistake in one does not hide those in the others.

Of a group that is wrong, the files it names and the layout are still looked at; what else depends on it is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from configs.schema.base import StrictModel
from configs.schema.convert import ConvertConfig
from configs.schema.data import DataConfig
from configs.schema.evaluate import EvaluateConfig
from configs.schema.export import ExportConfig
from configs.schema.launch import LaunchConfig
from configs.schema.load import validation_problems
from configs.schema.model import ModelConfig
from configs.schema.run import RunConfig, layout_problems
from configs.schema.select import SelectConfig
from configs.schema.train import PIPELINE_FIELDS, TrainConfig
from mcore.backend.layout import Layout
from mcore.data.rows import Method
from mcore.errors import Problem

G = TypeVar("G", bound=StrictModel)


@dataclass(frozen=True, slots=True)
class Groups:
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


def groups_of(raw: Mapping[str, Any] | RunConfig) -> tuple[Groups, list[Problem]]:
    """Every group that is right by itself, and the findings about the others."""
    problems: list[Problem] = []
    run = raw if isinstance(raw, RunConfig) else None
    if run is None:
        try:
            run = RunConfig.model_validate(raw)
        except ValidationError as exc:
            problems = as_problems(validation_problems(exc, RunConfig))
            groups = _single_groups(cast(Mapping[str, Any], raw))
            compared = any(finding["loc"] == () for finding in exc.errors())
            if not compared:  # pydantic leaves this out if any group is wrong
                problems += _layout_problems(cast(Mapping[str, Any], raw), groups)
            return groups, problems
    return (
        Groups(
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


def _single_groups(raw: Mapping[str, Any]) -> Groups:
    train = _group(raw, "train", TrainConfig)
    given = raw.get("train")
    # Rows can be checked even if something else in `train` is wrong.
    method: Method = "pt" if isinstance(given, Mapping) and given.get("method") == "pt" else "sft"
    source = value_of(raw, "model", ModelConfig, "source")
    return Groups(
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


def value_of(raw: Mapping[str, Any], name: str, model: type[StrictModel], field: str) -> Any:
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
    values = {field.name: value_of(raw, "train", TrainConfig, field.name) for field in dataclasses.fields(Layout)}
    known = {name: value for name, value in values.items() if value is not None}
    if known.get("pipeline_model_parallel_size", 1) == 1:  # what then makes no sense was said with `train`
        for name in PIPELINE_FIELDS:
            known.pop(name, None)
    if known.get("tensor_model_parallel_size", 1) == 1:
        known.pop("sequence_parallel", None)
    return Layout(**({"expert_tensor_parallel_size": 1} | known))


def _layout_problems(raw: Mapping[str, Any], groups: Groups) -> list[Problem]:
    train, launch = groups.train, groups.launch
    nnodes, nproc = (
        getattr(launch, field) if launch else value_of(raw, "launch", LaunchConfig, field)
        for field in ("nnodes", "nproc_per_node")
    )
    if nproc is None:
        return []
    micro, total = (
        getattr(train, field) if train else value_of(raw, "train", TrainConfig, field)
        for field in ("micro_batch_size", "global_batch_size")
    )
    layout = groups.layout
    found = layout_problems(
        (nnodes or 1) * nproc,
        layout.model_parallel_size,
        micro,
        total,
        expert_parallel_size=layout.expert_parallel_size,
        interleaved_stages=train.interleaved_stages if train else 1,
        nnodes=nnodes or 1,
    )
    return [Problem(text) for text in found]


def as_problems(findings: Iterable[tuple[str, str]]) -> list[Problem]:
    """Problems of findings that are a place and what is wrong there."""
    return [Problem(f"{place}: {what}") for place, what in findings]
