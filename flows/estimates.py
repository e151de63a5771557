"""How long a stage would take and how much room its artifact would need, by the earlier artifact most like it.

Only what was measured is told: a stage of which the store has none gets no estimate. Training is scaled by its samples
and, of what an interrupted run has saved already, only the rest counts; everything else is taken as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.nearest import Nearest
from mcore.artifacts import Manifest
from tasks.graph import StagePlan


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that a stage takes, bytes that its artifact takes, and the artifact (`kind/key`) that says so."""

    seconds: float
    num_bytes: int
    source: str


def estimate(stage: StagePlan, like: Nearest | None, *, done_iterations: int = 0) -> Estimate | None:
    """What a stage is expected to take; None if there is nothing to go by.

    Args:
        stage: The stage.
        like: The earlier artifact that is most like what it would make.
        done_iterations: Steps that an interrupted training run has behind it.
    """
    if like is None:
        return None
    seconds = like.manifest.duration_s
    if stage.kind == "train":
        seconds *= _share_of_training(stage.ingredients, like.manifest, done_iterations)
    return Estimate(seconds, size_of(like.manifest), like.artifact)


def size_of(manifest: Manifest) -> int:
    """Bytes of an artifact's files."""
    return sum(int(entry["size"]) for entry in manifest.files.values())


def _rows(ingredients: Mapping[str, Any]) -> Any:
    """What tells the rows of a training: the artifact with their tokens."""
    return ingredients.get("inputs", {}).get("data")


def _share_of_training(ingredients: Mapping[str, Any], earlier: Manifest, done_iterations: int) -> float:
    """Samples that are still to be learnt, over those of the earlier run; 1 where the settings don't tell."""
    then, now = earlier.ingredients.get("config", {}), ingredients["config"]
    iters_then, iters_now = earlier.metrics.get("iterations"), now.get("train.train_iters")
    batch_then, batch_now = then.get("train.global_batch_size"), now.get("train.global_batch_size")
    epochs_then, epochs_now = then.get("train.num_train_epochs"), now.get("train.num_train_epochs")
    if not isinstance(iters_then, int) or iters_then <= 0 or not batch_then:
        return 1.0
    if iters_now is None and epochs_now and epochs_then and _rows(earlier.ingredients) == _rows(ingredients):
        iters_now = iters_then * batch_then / batch_now * epochs_now / epochs_then  # the same samples a pass
    if iters_now is None:
        return 1.0
    return float(max(0.0, iters_now - done_iterations) * batch_now / (iters_then * batch_then))
