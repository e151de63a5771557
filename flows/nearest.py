"""What is other now than in the earlier artifact of a stage that is most like it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from mcore.artifacts import Manifest
from mcore.runs import judged, lineage, published
from tasks.differences import Difference, differences, reasons, roles
from tasks.graph import StagePlan
from tasks.preflight import CheckedRun


@dataclass(frozen=True, slots=True)
class Nearest:
    """The earlier artifact of a stage that is most like what is wanted, and all that is other."""

    manifest: Manifest
    differences: tuple[Difference, ...]

    @property
    def artifact(self) -> str:
        """`kind/key`."""
        return f"{self.manifest.kind}/{self.manifest.key}"


class Earlier:
    """The artifacts of a store, read once, and those among them that a run is compared with.

    Args:
        checked: The run.
    """

    def __init__(self, checked: CheckedRun) -> None:
        self.by_name = {f"{manifest.kind}/{manifest.key}": manifest for manifest in checked.store.manifests()}
        self.is_new_run = not checked.store.run_dir(checked.run.name).is_dir()
        model = published(checked.store, checked.run.name)
        own = judged(self.by_name, lineage(self.by_name, *([model] if model is not None else [])))
        self._tiers = ([self.by_name[name] for name in sorted(own)], list(self.by_name.values()))

    def nearest(self, stage: StagePlan, but: str | None = None) -> Nearest | None:
        """What the run itself published last counts first, then what is most like; of several the newest.

        Args:
            stage: What is wanted.
            but: Artifact (`kind/key`) that is not looked at.
        """
        wanted = json.loads(json.dumps(stage.ingredients))  # as a manifest gives it back
        for manifests in self._tiers:
            alike = [
                Nearest(manifest, tuple(differences(stage.name, manifest.ingredients, wanted)))
                for manifest in manifests
                if manifest.kind == stage.kind
                and f"{manifest.kind}/{manifest.key}" != but
                and roles(manifest.ingredients) == roles(wanted)
            ]
            if alike:
                return min(alike, key=lambda one: (len(reasons(one.differences)), -_time(one.manifest)))
        return None


def _time(manifest: Manifest) -> float:
    """When it was made, in seconds."""
    return datetime.fromisoformat(manifest.created).timestamp()
