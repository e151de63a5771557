"""The table has every argument, says the defaults that Megatron-SWIFT has, and names fields that a run has."""

import ast
import inspect
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from configs.schema.run import RunConfig
from flows.from_swift import rules, table
from flows.from_swift.command import Command
from flows.from_swift.draft import Draft, read
from flows.from_swift.table import Argument

KNOWN = yaml.safe_load((Path(__file__).parent / "megatron_swift_4_6_0.yaml").read_text())
BEYOND = {
    # Arguments of release 3, and of the hub, that the list of 4.6.0's common ones does not have.
    "model_revision", "task_type", "distributed_backend", "main_params_dtype", "no_gradient_accumulation_fusion",
    "manual_gc", "load_safetensors", "no_initialization", "use_cpu_initialization", "ckpt_format",
    "moe_router_bias_update_rate", "wandb_exp_name", "log_throughput", "enable_thinking",
}  # fmt: skip


def test_every_argument_has_a_row() -> None:
    names = [row.name for row in table.arguments()]
    assert len(names) == len(set(names))
    assert set(names) - BEYOND == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_defaults_are_those_of_megatron_swift(name: str) -> None:
    row, known = table.by_name()[name], KNOWN[name]
    if isinstance(known, dict):
        assert {tuner: row.default_with(tuner) for tuner in ("full", "lora")} == known
    else:
        assert row.default == known and row.lora_default is None
        assert type(row.default) is type(known) or name == "lora_alpha"


@pytest.mark.parametrize("row", table.arguments(), ids=lambda row: row.name)
def test_a_row_is_consistent(row: Argument) -> None:
    assert (row.target is not None) == (row.kind in {"same", "other"})
    assert (row.always is not None) == (row.kind == "always")
    assert row.note or row.kind in {"same", "always"} or row.effect in {"speed", "logging", "nothing"} or row.needs
    if row.target is not None:
        target = table.field(row.target)
        is_same = row.target.rpartition(".")[2] == row.name
        assert is_same or row.kind == "other"
        if row.default is not None and row.name not in rules.RULES:
            read(target, row.here(row.default))
    if row.needs is not None:
        assert row.needs.partition(" ")[0] in table.by_name()
        Draft(Command("sft", {}), {}, {}).holds(row.needs)


def test_old_names_are_not_names() -> None:
    names = {row.name for row in table.arguments()}
    old = [name for row in table.arguments() for name in row.old_names]
    assert len(old) == len(set(old)) and not names & set(old)


def test_rules_are_about_rows() -> None:
    assert set(rules.RULES) <= {row.name for row in table.arguments()}


def test_a_rule_that_puts_a_value_has_a_row_with_a_field() -> None:
    for name, rule in rules.RULES.items():
        puts = any(
            isinstance(node, ast.Attribute) and node.attr == "put"
            for node in ast.walk(ast.parse(inspect.getsource(rule)))
        )
        assert not puts or table.by_name()[name].target is not None, name


def test_a_field_that_is_none_is_an_error() -> None:
    with pytest.raises(KeyError):
        table.field("train.global_batchsize")
    assert table.field("name").info is RunConfig.model_fields["name"]
    assert table.field("evaluate.max_tokens").default == 64  # behind `EvaluateConfig | None`
    with pytest.raises(ValidationError):
        table.field("train.lr").read("fast")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("grad_clip", "clip_grad"),
        ("global_batchsize", "global_batch_size"),
        ("lora_ranks", "lora_rank"),
        ("zebra", None),
    ],
)
def test_what_was_probably_meant(written: str, meant: str | None) -> None:
    assert table.similar_name(written) == meant
