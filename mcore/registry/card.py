"""The model card, as hubs show it: YAML in front for programs, then a page. All of it from manifests, so that the same
model has the same card, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mcore.artifacts import Manifest, Store
from mcore.registry.gates import Evidence, named
from mcore.sources import catalogue
from mcore.sources.resolve import HUB_SOURCE
from mcore.wording import moment

TEMPLATE = "card.md.jinja"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
UNKNOWN = "other"
"""What hubs take for a licence that has no name of theirs."""


def card(store: Store, evidence: Evidence, model: str) -> str:
    """The card of an exported model.

    Args:
        store: The store.
        evidence: The model and what speaks for it.
        model: Its name in the registry.
    """
    lineage = {named(one): one for one in store.lineage(named(evidence.model))}
    training = _of_kind(lineage, "train")
    base, revision, licence = _base(lineage, evidence.model)
    config: dict[str, Any] = {}
    for maker in (_of_kind(lineage, "prepare"), training):
        config |= maker.ingredients.get("config", {}) if maker else {}
    is_adapter = "adapter_config.json" in evidence.model.files
    front = {
        "base_model": base,
        **({"base_model_relation": "adapter"} if is_adapter else {"base_model_relation": "finetune"}),
        "license": licence,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": _tags(config),
        "model-index": _index(evidence, model),
    }
    figures = evidence.figures
    judges = {named(one): one for one in (evidence.base_proof, evidence.proof, evidence.comparison)}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown; what goes in is ours, or in backticks
    )
    return environment.get_template(TEMPLATE).render(
        front_matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        model=model,
        is_adapter=is_adapter,
        base_model=base,
        base_revision=revision,
        code=evidence.model.versions.get("code"),
        exported=moment(evidence.model.created),
        content=evidence.model.content,
        lineage=[_row(one) for one in (lineage | judges).values()],
        versions=_versions([*lineage.values(), evidence.evaluation]),
        data=list(_data(config)),
        training={
            name: _number(value) for name, value in (training.metrics if training else {}).items() if _plain(value)
        },
        configuration=yaml.safe_dump(dict(config), sort_keys=True, allow_unicode=True),
        evaluation={
            "suite": figures.tuned.suite,
            "num_cases": figures.tuned.num_cases,
            "vllm": figures.tuned.vllm_version,
            "dtype": figures.tuned.dtype,
            "base_passed": figures.base.num_passed,
            "tuned_passed": figures.tuned.num_passed,
            "perplexity": figures.perplexity_ratio is not None
            and [_number(side.perplexity) for side in (figures.base, figures.tuned)],
            "gates": [gate.model_dump() | {"found": _number(gate.found)} for gate in figures.gates],
        },
        proofs=[
            {"what": what, "name": named(proof), **{name: _number(proof.metrics.get(name)) for name in PROOF_FIGURES}}
            for what, proof in (("base", evidence.base_proof), ("this model", evidence.proof))
        ],
        licence_text=_licence_text(licence, evidence.model),
    )


PROOF_FIGURES = ("num_tensors", "num_differing_tensors", "relative_error", "max_relative_error", "top1_agreement")


def _of_kind(lineage: Mapping[str, Manifest], kind: str) -> Manifest | None:
    return next((one for one in lineage.values() if one.kind == kind), None)


def _base(lineage: Mapping[str, Manifest], model: Manifest) -> tuple[str, str, str]:
    """Name, exact revision and licence of the base model."""
    fetched = _of_kind(lineage, "fetch")
    if fetched is None:  # a folder of the user's own, which the digest of its files stands for
        digest = next(
            (name for one in lineage.values() for name in one.inputs.values() if name.startswith("local/")), ""
        )
        return digest or "unknown", digest or "unknown", UNKNOWN
    identity = str(fetched.ingredients["source"])
    if hub := HUB_SOURCE.fullmatch(identity):
        return hub["repo"], hub["revision"] or "", UNKNOWN
    for name in catalogue.names():
        entry = catalogue.entry(name)
        if identity == f"{entry.wheel} sha256:{entry.sha256}":
            return name, identity, entry.license.lower()
    return identity, identity, UNKNOWN


def _licence_text(licence: str, model: Manifest) -> str:
    """What is known of the terms: the licence's name, and the files of the base that came along."""
    files = [name for name in model.files if any(Path(name).match(pattern) for pattern in LICENCE_FILES)]
    beside = (
        f" The base model's terms are beside the weights: {', '.join(f'`{name}`' for name in files)}." if files else ""
    )
    if licence == UNKNOWN:
        return f"A derived model is under the terms of its base, whose licence the manifests do not name.{beside}"
    return f"`{licence}`, as the base model.{beside}"


def _tags(config: Mapping[str, Any]) -> list[str]:
    own = [config.get("train.method"), config.get("train.tuner_type")]
    return ["mcore-flows", "megatron-core", *(str(tag) for tag in own if tag)]


def _index(evidence: Evidence, model: str) -> list[dict[str, Any]]:
    """Figures as hubs list them."""
    tuned = evidence.figures.tuned
    metrics: list[dict[str, Any]] = [{"type": "pass_rate", "value": tuned.pass_rate}]
    if tuned.perplexity is not None:
        metrics.append({"type": "perplexity", "value": tuned.perplexity})
    dataset = {"name": tuned.suite, "type": "suite"}
    results = [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}]
    return [{"name": model, "results": results}]


def _row(manifest: Manifest) -> dict[str, str]:
    inputs = ", ".join(f"{role} `{name}`" for role, name in manifest.inputs.items())
    source = manifest.ingredients.get("source")
    return {"name": named(manifest), "made": moment(manifest.created), "inputs": inputs or f"`{source}`"}


def _versions(manifests: list[Manifest]) -> dict[str, str]:
    """Package versions of all environments that took part; several of one package are all named."""
    found: dict[str, dict[str, None]] = {}
    for manifest in manifests:
        for name, version in manifest.versions.items():
            if name != "code":
                found.setdefault(name, {})[version] = None
    return {name: ", ".join(versions) for name, versions in sorted(found.items())}


def _data(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("data.dataset", "data.val_dataset"):
        for digest in config.get(name) or ():
            yield name, str(digest)


def _plain(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
