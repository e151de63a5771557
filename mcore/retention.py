"""Which artifacts somebody may still need, and the end of the others, so that nobody ever sees half of one.

Kept, with all that it was made from: what an alias points to, and what it pointed to before; what a run published and
what judges that; what the newest attempt of each run made or would go on from; of the trainings on one base with the
same validation rows the best one, with its export; the newest of each kind. Whatever somebody has the lease of, or
belongs to a run that is under way, is in use. Of the registry, releases stay that an alias can still come to, and
questions whose decision stays.

What goes is renamed into `.trash` first, under its own lease, and deleted then. A run registers its needs under the
lease that decisions are made under (`mcore/runs.py`), so none can start between a decision and the renaming.
"""

from __future__ import annotations

import shutil
import uuid
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mcore.artifacts import Manifest, Store
from mcore.errors import ArtifactError
from mcore.folders import fsync_path, remove
from mcore.registry.aliases import REGISTRY, Registry, models, registered
from mcore.registry.unused import approvals, releases
from mcore.runs import (
    REGISTER_LOCK,
    RunRecord,
    judged,
    lineage,
    maker,
    published,
    records,
    run_names,
)

TRASH = ".trash"
NOT_KINDS = ("runs", REGISTRY)
"""Folders of a store that hold no artifacts."""


@dataclass(frozen=True, slots=True)
class Holding:
    """A folder of the store: an artifact, whole or not, or one that was being made; a release or a question.

    Attributes:
        path: The folder, or the file of a question.
        kind: Kind of artifact; `release` or `approval` in the registry.
        key: Its key; there, model and name.
        num_bytes: Room that its files take.
        created: When it was made (UTC, ISO 8601); empty if it has no manifest.
        why: Why it is kept; empty if it may go.
        model: Model of the registry that it belongs to; empty of artifacts.
    """

    path: Path
    kind: str
    key: str
    num_bytes: int
    created: str
    why: str
    model: str = ""


def holdings(store: Store, *, keep_last: int) -> list[Holding]:
    """Everything that takes room in the store, with the reason to keep it if there is one.

    Args:
        store: The store.
        keep_last: How many of each kind are kept whatever they are, the newest.
    """
    manifests = {f"{manifest.kind}/{manifest.key}": manifest for manifest in store.manifests()}
    newest = list(records(store))
    reasons = _reasons(store, manifests, newest, keep_last)
    found = []
    for folder in artifact_folders(store):
        kind, key = folder.parent.name, folder.name
        manifest = manifests.get(f"{kind}/{key}")
        why = reasons.get(f"{kind}/{key}", "")
        why = why or _leased(store, kind, key)
        found.append(Holding(folder, kind, key, _num_bytes(folder), manifest.created if manifest else "", why))
    unfinished = {stage.artifact: record.name for record in newest for stage in record.stages}
    for folder in sorted(store.root.glob(".partial/*")):
        kind, _, rest = folder.name.removeprefix(".").partition("-")  # `.convert-….partial` is of a killed command
        key = rest.partition(".")[0]
        why = f"run {unfinished[f'{kind}/{key}']} would go on from it" if f"{kind}/{key}" in unfinished else ""
        why = why or _leased(store, kind, key)
        found.append(Holding(folder, kind, key, _num_bytes(folder), "", why))
    kept = {f"{one.kind}/{one.key}" for one in found if one.why} | unfinished.keys()
    return found + list(_of_registry(store, kept))


def _of_registry(store: Store, kept: Container[str]) -> Iterator[Holding]:
    for model in models(store):
        registry = Registry(store, model)
        for kind, some in (("release", releases(registry, kept)), ("approval", approvals(registry, kept))):
            for path, why in some:
                yield Holding(path, kind, f"{model}/{path.stem}", _num_bytes(path), "", why, model)


def artifact_folders(store: Store) -> list[Path]:
    """The folder of every artifact, whole or not."""
    folders = sorted(folder for folder in store.root.glob("*/*") if folder.is_dir() and not folder.is_symlink())
    return [one for one in folders if one.parent.name not in NOT_KINDS and not one.parent.name.startswith(".")]


def collect(store: Store, *, keep_last: int) -> tuple[list[Holding], list[Holding]]:
    """Delete what nobody needs.

    Returns:
        What was deleted, and what could not be as somebody had just begun to make it.
    """
    trash = store.root / TRASH
    gone: list[Holding] = []
    in_use: list[Holding] = []
    moved: list[Path] = []
    with store.lock(*REGISTER_LOCK):
        for holding in holdings(store, keep_last=keep_last):
            if holding.why:
                continue
            place = trash / f"{holding.kind}-{holding.key.replace('/', '-')}-{uuid.uuid4().hex}"
            if _set_aside(store, holding, place):
                gone.append(holding)
                moved.append(place)
            else:
                in_use.append(holding)
        for parent in {holding.path.parent for holding in gone}:
            fsync_path(parent)
        leftovers = set(trash.glob("*")) - set(moved)  # of a collection that was killed
    for place in moved:
        remove(place)
    for place in leftovers:
        shutil.rmtree(place, ignore_errors=True)
    return gone, in_use


def _leased(store: Store, kind: str, key: str) -> str:
    claim = maker(store, kind, key)
    if claim is None:
        return ""
    return f"in use by run {claim.run}" if claim.run else "in use"


def _set_aside(store: Store, holding: Holding, place: Path) -> bool:
    """Rename a folder out of sight; False if somebody makes it anew, or moves an alias, right now."""
    lock = (REGISTRY, holding.model) if holding.model else (holding.kind, holding.key)
    if maker(store, *lock) is not None:
        return False
    try:
        # Not waited for: whoever moves an alias waits for the decision that is made here.
        with store.lock(*lock, timeout_s=0) as lease:
            if lease.adopted is not None:
                return False
            place.parent.mkdir(exist_ok=True)
            holding.path.rename(place)
    except ArtifactError:
        return False
    return True


def _reasons(
    store: Store, manifests: Mapping[str, Manifest], newest: Iterable[RunRecord], keep_last: int
) -> dict[str, str]:
    """Why artifacts are kept, by `kind/key`; the first reason counts."""
    reasons: dict[str, str] = {}

    def keep(why: str, names: Iterable[str]) -> None:
        for name in names:
            reasons.setdefault(name, why)

    for record in newest:
        if record.state == "running":
            needed = [*(stage.artifact for stage in record.stages), *_inputs(record)]
            keep(f"in use by run {record.name}", [*needed, *lineage(manifests, *needed)])
    for alias, named in registered(store).items():
        keep(alias, judged(manifests, lineage(manifests, *named)))
    for name in run_names(store):
        model = published(store, name)
        if model is not None:
            keep(f"published by {name}", judged(manifests, lineage(manifests, model)))
    for record in newest:
        keep(f"of run {record.name}", lineage(manifests, *(stage.artifact for stage in record.stages)))
    for best in _best(manifests):
        made = [name for name, one in manifests.items() if one.kind == "export" and best in one.inputs.values()]
        keep("best by validation loss", judged(manifests, lineage(manifests, best, *made)))
    by_kind: dict[str, list[Manifest]] = defaultdict(list)
    for manifest in manifests.values():
        by_kind[manifest.kind].append(manifest)
    for kind, some in by_kind.items():
        some.sort(key=lambda manifest: manifest.created)
        last = [f"{kind}/{manifest.key}" for manifest in some[len(some) - min(keep_last, len(some)) :]]
        keep(f"among the last {keep_last}", lineage(manifests, *last))
    return reasons


def _inputs(record: RunRecord) -> list[str]:
    return [artifact for stage in record.stages for artifact in stage.inputs.values()]


def _best(manifests: Mapping[str, Manifest]) -> list[str]:
    """Of trainings that can be compared, on one base and with the same validation rows, the one of the lowest loss."""
    lowest: dict[str, tuple[float, str]] = {}
    for name, manifest in manifests.items():
        loss = manifest.metrics.get("best_validation_loss")
        if manifest.kind != "train" or not isinstance(loss, int | float):
            continue
        # What the rows were is told by the artifact that holds their tokens; before there was one, by the training.
        data = manifests.get(manifest.inputs.get("data", ""), manifest)
        config = data.ingredients.get("config", {})
        split = [config.get(field) for field in ("data.dataset", "data.split_dataset_ratio")]
        group = f"{manifest.inputs.get('base')} {config.get('data.val_dataset') or split}"
        lowest[group] = min(lowest.get(group, (float("inf"), name)), (float(loss), name))
    return [name for _, name in lowest.values()]


def _num_bytes(folder: Path) -> int:
    total = 0
    for path in (folder, *folder.rglob("*")):
        try:
            stat = path.lstat()
        except FileNotFoundError:
            continue  # it is being made
        total += stat.st_size if path.is_symlink() or not path.is_dir() else 0
    return total
