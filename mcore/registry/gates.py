"""What speaks for a model: its proofs and its evaluation, read from the store and not from who asks.

A gate that said no commits nothing, so what is there has passed; it is held against its limits again all the same, and
must have been made from just this model: an artifact that was made again since has another content under the same key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from mcore.artifacts import Manifest, Store
from mcore.errors import ConfigError, GateError, Problem
from mcore.evaluate.comparison import Comparison, read_comparison

FIX = "Run the run that made it again: what is missing is made anew."


@dataclass(frozen=True, slots=True)
class Evidence:
    """An exported model and what speaks for it, all of it whole."""

    model: Manifest
    base_proof: Manifest
    proof: Manifest
    comparison: Manifest
    figures: Comparison
    evaluation: Manifest
    """The evaluation of the model itself, which `comparison` was made from."""

    @property
    def artifact(self) -> str:
        """`export/key`."""
        return named(self.model)


def named(manifest: Manifest) -> str:
    """`kind/key` of an artifact."""
    return f"{manifest.kind}/{manifest.key}"


def evidence(store: Store, artifact: str, *, given: Mapping[str, str] | None = None, fresh: bool = False) -> Evidence:
    """The proofs and the evaluation of an exported model.

    Args:
        store: The store.
        artifact: `export/key` of the model.
        given: `kind/key` of `base_proof`, `proof` and `comparison`, those of a run; of those not given the newest in
            the store that was made of this model.
        fresh: Read every file, also those that seem unchanged.

    Raises:
        ConfigError: It is no exported model.
        GateError: A proof or an evaluation is missing, damaged, was made of something else, or did not pass. Names all.
    """
    if artifact.partition("/")[0] != "export":
        raise ConfigError("only an exported model can be promoted", [Problem(artifact, "export/…")])
    problems: list[Problem] = []
    model = _whole(store, artifact, problems, fresh=fresh)
    if model is None:
        raise GateError("the model can't be promoted", problems)
    everything = {named(one): one for one in store.manifests()}
    found: dict[str, Manifest | None] = {}
    for role, what in (
        ("base_proof", "a proof of its base"),
        ("proof", "a proof of it"),
        ("comparison", "an evaluation"),
    ):
        candidates = [one for one in everything.values() if _is_of(role, one, model, everything)]
        name = (given or {}).get(role) or max(((one.created, named(one)) for one in candidates), default=("", ""))[1]
        if not name:
            problems.append(Problem(artifact, f"{what} beside a base, with gates", "none in the store", FIX))
        elif name not in map(named, candidates):
            problems.append(Problem(name, f"{what}, {artifact}", "one that is missing or of something else", FIX))
        else:
            found[role] = _whole(store, name, problems, fresh=fresh)
            problems += _made_of_others(store, everything[name], everything)
    for role in ("base_proof", "proof"):
        proof = found.get(role)
        if proof is not None:
            problems += _proof_problems(store, proof)
    figures, evaluation = None, None
    comparison = found.get("comparison")
    if comparison is not None:
        evaluation = everything[comparison.inputs["tuned"]]
        problems += _made_of_others(store, evaluation, everything)
        try:
            figures = read_comparison(store.path(comparison.kind, comparison.key))
            problems += _evaluation_problems(named(comparison), figures)
        except ConfigError as exc:
            problems += exc.problems
    if problems:
        raise GateError("the model can't be promoted", problems)
    base_proof, proof = found["base_proof"], found["proof"]
    assert base_proof and proof and comparison and figures and evaluation
    return Evidence(model, base_proof, proof, comparison, figures, evaluation)


def _whole(store: Store, name: str, problems: list[Problem], *, fresh: bool) -> Manifest | None:
    kind, _, key = name.partition("/")
    status = store.status(kind, key, fresh=fresh)
    if status.manifest is None:
        problems.append(Problem(name, "a whole artifact", status.why, FIX))
    return status.manifest


def _is_of(role: str, one: Manifest, model: Manifest, everything: Mapping[str, Manifest]) -> bool:
    """Whether an artifact is a proof of the model's base, of the model, or a comparison of the model with a base."""
    if role == "base_proof":
        return (
            one.kind == "verify" and "selection" not in one.inputs and one.inputs.get("mcore") == model.inputs["base"]
        )
    if role == "proof":
        of_model = named(model) in (one.inputs.get("hf"), one.inputs.get("adapter"))
        return one.kind == "verify" and of_model and one.inputs.get("mcore") == model.inputs["trained"]
    evaluated = everything.get(one.inputs.get("tuned", ""))
    return (
        one.kind == "compare"
        and evaluated is not None
        and named(model) in (evaluated.inputs.get("model"), evaluated.inputs.get("adapter"))
    )


def _made_of_others(store: Store, one: Manifest, everything: Mapping[str, Manifest]) -> list[Problem]:
    """Inputs that are not what they were when an artifact was made of them."""
    content = {role: everything[name].content for role, name in one.inputs.items() if name in everything}
    return [
        Problem(f"{named(one)}, its {role}", "the content that it was made of", "another: it was made again since", FIX)
        for role in one.outdated_inputs(content)
    ]


def _proof_problems(store: Store, proof: Manifest) -> list[Problem]:
    """What a proof says against the model, by its figures and by its report; NaN is no figure."""
    problems, name, figures = [], named(proof), proof.metrics
    try:
        verdict = json.loads((store.path(proof.kind, proof.key) / "report.json").read_text()).get("passed")
    except (OSError, ValueError, AttributeError) as exc:
        return [Problem(name, "a report", str(exc), FIX)]
    for field, value in (("passed in its report", verdict), ("passed", figures.get("passed"))):
        if value is not True:
            problems.append(Problem(f"{name}, {field}", "true", str(value)))
    if figures.get("num_differing_tensors") != 0:
        problems.append(Problem(f"{name}, tensors that differ", "0", str(figures.get("num_differing_tensors"))))
    error, limit = figures.get("relative_error"), figures.get("max_relative_error")
    # Asked the other way round: an error that is no number is below no limit.
    if not (isinstance(error, int | float) and isinstance(limit, int | float) and -math.inf < error <= limit):
        problems.append(Problem(f"{name}, error of its logits", f"at most {limit}", str(error)))
    return problems


def _evaluation_problems(name: str, figures: Comparison) -> list[Problem]:
    if not figures.gates:
        return [Problem(name, "a gate: min_pass_rate or max_regression", "none, so nothing was asked of the model")]
    return [
        Problem(f"{name}, {gate.gate} of {gate.subject}", f"{gate.limit:g}", f"{gate.found:.4g}")
        for gate in figures.failed_gates
    ]
