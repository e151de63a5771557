"""Everything that can be said against a conversion before weights are read: one error with all of it, or a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mcore.bridge.dims import ModelDims
from mcore.bridge.families import config_findings, dims_of, family_of_config, without_effect
from mcore.bridge.further_tokens import config_of_files
from mcore.bridge.hf_config import read_hf_config
from mcore.bridge.hf_files import StoredRows
from mcore.bridge.hf_headers import StoredTensor, scan_headers
from mcore.bridge.hf_quantised import METHODS, method_of, quantisation_of
from mcore.bridge.plan import Plan, mcore_problems, mcore_shapes_of, plan_convert
from mcore.bridge.rules import Family
from mcore.bridge.workers import Meanwhile
from mcore.errors import ConfigError, Problem, SourceError, WeightPlanError
from mcore.findings import BROKEN, Findings
from mcore.progress import say

if TYPE_CHECKING:
    from mcore.backend.meta import CheckpointContent

MEANWHILE_FROM_BYTES = 2 * 2**30
"""Weights that take longer to copy than megatron-core takes to import and to build their model."""
ROWS_COMPARED = 4096
"""Rows of a tied model's two copies that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that was checked and can begin.

    Attributes:
        plan: What goes where.
        config: The model's config, without what the files do not hold.
        num_stored: Tensors in the files.
        family_name: Whose table the plan follows.
        told: What megatron's model of this config saves, or the process that is finding out.
    """

    plan: Plan
    config: Mapping[str, Any]
    num_stored: int
    family_name: str
    told: CheckpointContent | Meanwhile[CheckpointContent]

    def look(self) -> None:
        """Raise what `content` would, if that is known by now."""
        if isinstance(self.told, Meanwhile):
            self.told.look()

    def content(self) -> CheckpointContent:
        """What megatron's model of this config saves; waits until it is known.

        Raises:
            InputError: The model can't be built (ConfigError), or is not what the table says (WeightPlanError).
        """
        if not isinstance(self.told, Meanwhile):
            return self.told  # the plan was made by it
        content = self.told.result()
        shapes = {key: tensor.shape for key, tensor in content.tensors.items()}
        if problems := mcore_problems(self.family_name, self.plan.dims, self.plan.steps, shapes):
            raise WeightPlanError(f"the weights do not fit the {self.family_name} table", problems)
        return content


def check(
    hf: Path,
    *,
    make_vocab_size_divisible_by: int = 128,
    family: Family | None = None,
    content: CheckpointContent | None = None,
) -> Conversion:
    """Compare config, headers and megatron's model. Reads no weights but those of a tied model's second copy.

    Of a large model, megatron's is still being built when this returns; see `Conversion.look` and `content`.

    Arguments as in `mcore.bridge.convert.convert`; `content` is what megatron's model holds, where there is a model. If
    None it is told from the config.

    Raises:
        InputError: As `convert`, with everything that is wrong with config, files, and what they say together.
    """
    findings = Findings()
    config = findings.of(lambda: read_hf_config(hf))
    if not hf.is_dir():
        findings.raise_all()
    headers = scan_headers(hf)
    stored = headers.tensors
    if headers.problems:
        findings.errors.append(SourceError("the model's weights can't be read", headers.problems))
    if config is None:
        findings.raise_all()
    if not headers.problems and (whole := config_of_files(config, stored)) != config:
        say("convert: the files hold no layers for further tokens, which config.json speaks of: they are left out")
        config = whole
    quantisation = findings.of(lambda: quantisation_of(config))
    of_config = config_findings(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    findings.take(of_config)
    said = Findings()  # the same again, of what is wrong with the config
    family = family or said.of(lambda: family_of_config(config))
    dims = said.of(lambda: dims_of(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by))
    if family is None or dims is None or (dims.num_layers > len(stored) and headers.problems):
        findings.raise_all()  # what the weights of so many layers should be is more than damaged files can tell
    meanwhile = None
    if content is None and not of_config.problems:
        if sum(tensor.num_bytes for tensor in stored.values()) >= MEANWHILE_FROM_BYTES:
            meanwhile = Meanwhile("megatron's model", partial(_content, dict(config), dims, num_stored=len(stored)))
        else:
            content = findings.of(lambda: _content(config, dims, num_stored=len(stored)))
    shapes = {k: t.shape for k, t in content.tensors.items()} if content else mcore_shapes_of(family, dims)
    plan = findings.of(
        lambda: plan_convert(
            family,
            dims,
            hf=stored,
            mcore_shapes=shapes,
            quantisation=quantisation,
            are_files_whole=not headers.problems,
        )
    )
    if plan is None and quantisation is None and (method := method_of(config)) is not None:
        findings.errors.append(_unknown_quantisation(method))
    if plan is not None and not headers.problems:
        findings.of(lambda: _compare_tied(plan, stored))
    if findings.problems and meanwhile is not None:
        findings.of(meanwhile.result)
    told = content or meanwhile
    if findings.problems or plan is None or told is None:
        findings.raise_all()
    say(f"convert: {family.hf_architecture}, {len(stored)} tensors, {dims.num_layers} layers")
    for text in without_effect(config):
        say(f"convert: {text} of config.json has no effect: training runs without dropout and noise")
    for copy, original in plan.equal_hf:
        say(f"convert: {copy} equals {original} bit for bit, which stands for both")
    for name in plan.ignored_hf:
        say(f"convert: {name} is left out, as it is no weight of the model")
    return Conversion(plan, config, len(stored), family.name, told)


def parameters(checked: Conversion) -> Iterator[int]:
    """Numbers in each Hugging Face tensor that is converted."""
    for step in checked.plan.steps:
        for shape in step.rule.hf_shapes(checked.plan.dims):
            yield math.prod(shape)


def _content(config: Mapping[str, Any], dims: ModelDims, *, num_stored: int) -> CheckpointContent:
    """What megatron's model of this config saves."""
    from mcore.backend.meta import sharded_shapes  # megatron: seconds that copying need not wait for

    if dims.num_layers > num_stored:  # before a model of a million layers is built
        raise ConfigError(
            "config.json and weights disagree",
            [
                Problem(
                    "config.json: num_hidden_layers",
                    f"less than the {num_stored} tensors in the files, as each layer has several",
                    str(dims.num_layers),
                )
            ],
        )
    try:
        return sharded_shapes(config, padded_vocab_size=dims.padded_vocab, params_dtype=torch.bfloat16)
    except (*BROKEN, RuntimeError, AssertionError) as exc:  # from megatron-core or torch
        text = f"{type(exc).__name__}: {exc}"[:500]
        raise ConfigError(
            "megatron-core can't build the model", [Problem("config.json", "a model that can be built", text)]
        ) from exc


def _unknown_quantisation(method: str) -> ConfigError:
    wanted = f"one of {', '.join(METHODS)}, or no quantization_config"
    return ConfigError(
        "the model is quantised in a way that is not known",
        [
            Problem(
                "config.json: quantization_config.quant_method", wanted, repr(method), "Take the unquantised weights."
            )
        ],
    )


def _compare_tied(plan: Plan, stored: Mapping[str, StoredTensor]) -> None:
    problems = [
        Problem(
            f"hf {copy}",
            f"the same bytes as {original}",
            "other ones",
            "If it is the output layer's own weight, set tie_word_embeddings to false in config.json.",
        )
        for copy, original in plan.equal_hf
        if not _equal(stored[copy], stored[original])
    ]
    if problems:
        raise WeightPlanError("the model shares weights, but its files hold different ones", problems)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same bytes. NaN equals the same NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    for first_row in range(0, one.shape[0], ROWS_COMPARED):
        rows = slice(first_row, min(first_row + ROWS_COMPARED, one.shape[0]))
        if not torch.equal(StoredRows(one)[rows].view(torch.uint8), StoredRows(other)[rows].view(torch.uint8)):
            return False
    return True
