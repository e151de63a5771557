"""The stages of a run and their keys, all known before anything runs.

A stage's key is the digest of its ingredients: its version, the fields of the run that it reads, the digests of the
files that it reads, and the keys of its inputs. Since keys follow from keys, `mcore-flows plan` needs no artifact to
say what a run would do, and a run that is started again finds what is already there.

A proof must stand before what it guards may start, but does not change what comes out. So it is named in the lineage
and not in the key: a stricter proof is made anew, and what was trained behind the old one stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema.run import RunConfig
from mcore.artifacts import Store, digest_of, folder_digest
from mcore.data.sampling import parse_spec
from mcore.data.sources.identity import content_digest

if TYPE_CHECKING:
    from mcore.sources.resolve import ResolvedSource

LOCAL = "local"
"""Kind of an input that is no artifact: a model folder of the user's own. Its key is the digest of its files."""

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""What is read of a local model folder: weights, their index, configs, tokenizer, chat template."""

_EVALUATION = (
    "evaluate.suite",
    "evaluate.perplexity_dataset",
    "evaluate.torch_dtype",
    "evaluate.max_model_len",
    "evaluate.max_tokens",
    "evaluate.tensor_parallel_size",
    "train.method",  # the kind of the held-out rows
    "data.model_name",  # the placeholders in suite and rows are filled with these
    "data.model_author",
    "data.system",
)

_SERVED = ("data.system", "data.enable_thinking", "data.template", "data.model_name", "data.model_author")
"""What the exported model's chat template is written from."""

FILE_FIELDS = frozenset(
    {
        "data.dataset",
        "data.val_dataset",
        "data.adapter",
        "data.template",
        "evaluate.suite",
        "evaluate.perplexity_dataset",
    }
)
"""Fields that name files: their content goes into the key, their place does not."""

WITHOUT_EFFECT = frozenset(
    {"train.async_save", "train.exit_duration_in_mins", "train.accept_changed_data", "data.dataset_num_proc"}
)
"""Fields of groups that stages read, of which nothing depends that comes out of a stage."""

ADAPTER_FIELD, ADAPTER_FILES = "train.adapter_load", ("adapter_config.json", "adapter_model.safetensors")
"""A field that names a folder, and what is read of it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One line of the graph.

    Attributes:
        name: Name of the stage in this graph.
        kind: Kind of artifact it makes; stages of one kind run the same code.
        inputs: Role of each input and the stage it comes from.
        reads: Groups and fields of the run that it reads, and nothing else. A group stands for all its fields.
        proofs: Role and stage of each proof that it waits for, so that nothing unproven goes on.
        version: Raised when the same ingredients would give another artifact than before.
    """

    name: str
    kind: str
    inputs: Mapping[str, str]
    reads: tuple[str, ...] = ()
    proofs: Mapping[str, str] = field(default_factory=dict)
    version: int = 1


# fmt: off
STAGES = (
    Stage("fetch",          "fetch",    {}),
    Stage("prepare",        "prepare",  {"hf": "fetch"}, ("data", "train.method")),
    Stage("convert",        "convert",  {"hf": "fetch"}, ("convert.make_vocab_size_divisible_by",),
          version=2),
    Stage("verify_convert", "verify",   {"hf": "fetch", "mcore": "convert"}, ("verify",)),
    Stage("train",          "train",    {"base": "convert", "data": "prepare"},
          ("train", "launch.nproc_per_node", "convert.make_vocab_size_divisible_by"),
          proofs={"proof": "verify_convert"}, version=3),
    Stage("select",         "select",   {"trained": "train"}, ("select",)),
    Stage("export",         "export",   {"trained": "train", "selection": "select", "base": "convert"},
          ("export.torch_dtype", "export.max_shard_size_gb", "export.merge_lora", *_SERVED)),
    Stage("verify_export",  "verify",   {"hf": "export", "mcore": "train", "selection": "select", "base": "convert"},
          ("verify",)),
    Stage("verify_served",  "verify",   {"model": "export", "base": "fetch"},
          ("data", "train.method", "evaluate.torch_dtype", "evaluate.max_model_len", "evaluate.tensor_parallel_size",
           "evaluate.num_served_prompts"),
          proofs={"proof": "verify_export"}),
    Stage("evaluate_base",  "evaluate", {"model": "fetch"}, _EVALUATION, version=2),
    Stage("evaluate_tuned", "evaluate", {"model": "export"}, _EVALUATION,
          proofs={"proof": "verify_export", "served": "verify_served"}, version=2),
    Stage("compare",        "compare",  {"base": "evaluate_base", "tuned": "evaluate_tuned"},
          ("evaluate.min_pass_rate", "evaluate.max_regression", "evaluate.max_perplexity_ratio",
           "evaluate.worse_confidence")),
    Stage("promote",        "promote",
          {"model": "export", "base_proof": "verify_convert", "proof": "verify_export", "comparison": "compare"},
          ("promote.alias", "promote.model", "promote.approval", "promote.push")),
)
# fmt: on
"""The whole line, each stage behind its inputs."""


ADAPTED = {"verify_export": "hf", "verify_served": "model", "evaluate_tuned": "model"}
"""Stages that take what is exported, and in what role; an adapter comes beside the base model."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of a particular run.

    Attributes:
        name: Name of the stage.
        kind: Kind of its artifact.
        key: Key of its artifact.
        ingredients: All that went into the key.
        inputs: `kind/key` of each input and proof by its role; the kind `local` is a folder outside the store.
    """

    name: str
    kind: str
    key: str
    ingredients: Mapping[str, Any] = field(repr=False)
    inputs: Mapping[str, str]

    @property
    def artifact(self) -> str:
        """`kind/key` of what it makes."""
        return f"{self.kind}/{self.key}"


def stages(run: RunConfig, source: ResolvedSource, store: Store) -> tuple[StagePlan, ...]:
    """The stages of a run with their keys, in the order in which they run.

    Args:
        run: The run.
        source: Its base model. A local folder needs no `fetch`.
        store: Remembers the digests of files, so that large ones are read once.

    Raises:
        OSError: A file that the run names can't be read (`tasks/preflight/` reports all of them before).
    """
    made: dict[str, str] = {}
    plans = []
    if source.path is not None:
        files = folder_digest(store.digests, Path(source.path), patterns=MODEL_FILES)
        made["fetch"] = f"{LOCAL}/{digest_of(files)}"
    for stage in STAGES:
        evaluates = stage.kind in {"evaluate", "compare"}
        if stage.name in made or (evaluates and run.evaluate is None):
            continue
        if stage.name == "promote" and run.promote is None:
            continue
        if stage.name == "verify_served" and (run.evaluate is None or not run.evaluate.num_served_prompts):
            continue
        inputs = {role: made[name] for role, name in inputs_of(stage, run).items()}
        ingredients: dict[str, Any] = {"stage": stage.kind, "version": stage.version, "inputs": inputs}
        if stage.name == "fetch":
            ingredients["source"] = source.identity
        ingredients["config"] = {name: _ingredient(run, name, store) for name in fields_read(stage)}
        if stage.name == "train" and run.launch.nnodes > 1:
            ingredients["config"]["launch.nnodes"] = run.launch.nnodes
        word = {str(name): word for name, word in run.launch.again.items()}.get(stage.name)
        if word is not None:
            ingredients["again"] = word
        proofs = {role: made[name] for role, name in stage.proofs.items() if name in made}
        plan = StagePlan(stage.name, stage.kind, digest_of(ingredients), ingredients, inputs | proofs)
        made[stage.name] = plan.artifact
        plans.append(plan)
    return tuple(plans)


def inputs_of(stage: Stage, run: RunConfig) -> Mapping[str, str]:
    """Role of each of a stage's inputs in a run, and the stage that it comes from.

    With `train.load_safetensors` training starts from the Hugging Face folder. The conversion is made all the same: the
    proof of it is what vouches for the table that weights are loaded by. Without `export.merge_lora` what is exported
    is an adapter, which is proven and served on top of the base model.
    """
    if stage.name == "train" and run.train.load_safetensors:
        return {**stage.inputs, "base": "fetch"}
    if stage.name in ADAPTED and not run.export.merge_lora:
        return {**stage.inputs, ADAPTED[stage.name]: "fetch", "adapter": "export"}
    return stage.inputs


def fields_read(stage: Stage) -> tuple[str, ...]:
    """Dotted names of the single fields of a run that a stage reads."""
    names: list[str] = []
    for name in stage.reads:
        if "." in name:
            names.append(name)
        else:
            group = RunConfig.model_fields[name].annotation
            names += [f"{name}.{field_name}" for field_name in group.model_fields]  # type: ignore[union-attr]
    return tuple(name for name in names if name not in WITHOUT_EFFECT)


def _ingredient(run: RunConfig, name: str, store: Store) -> Any:
    if name == "promote.model":
        return run.promoted_as
    group, _, field_name = name.partition(".")
    value = getattr(run, group).model_dump(mode="json")[field_name]
    if name == ADAPTER_FIELD and value is not None:
        return digest_of(folder_digest(store.digests, Path(value), patterns=ADAPTER_FILES))
    if name not in FILE_FIELDS or value is None:
        return value
    if isinstance(value, str):
        return store.digests.digest(Path(value))
    return [_dataset_ingredient(entry, store) for entry in value]


def _dataset_ingredient(entry: str, store: Store) -> str:
    """The entry with the digest of its source's content in place of its name."""
    spec = parse_spec(entry)
    assert not isinstance(spec, str), f"{entry}: {spec}; preflight should have said so"
    digest = content_digest(spec, store.digests)
    return digest if spec.num_rows is None else f"{digest}#{spec.num_rows}"
