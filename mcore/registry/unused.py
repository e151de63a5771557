"""What the registry may lose: releases that no alias leads to any more, and questions that were decided.

The history of a model stays, whatever becomes of its releases: it is a few lines, and says who moved what, and why.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path

from mcore.errors import ConfigError
from mcore.registry.aliases import ALIASES, RELEASES, Registry
from mcore.registry.approval import APPROVALS, read_request
from mcore.registry.release import Release


def releases(registry: Registry, kept: Container[str]) -> Iterator[tuple[Path, str]]:
    """Every release of a model, with why it stays; with no reason if it may go.

    Those stay that an alias points to, and those that it could be rolled back to, as long as their model is there. One
    that may go is made again if its model is promoted again.

    Args:
        registry: The registry of the model.
        kept: Artifacts that stay, `kind/key`.
    """
    reasons: dict[str, str] = {}
    for alias in ALIASES:
        present = registry.points_to(alias)
        for name in registry.stack(alias):
            if name != present and _artifact(registry.release_folder(name)) in kept:
                reasons.setdefault(name, f"{alias} of {registry.model} before")
        if present is not None:
            reasons[present] = f"{alias} of {registry.model}"
    # Those with a dot are what a kill in the middle of making one left.
    for folder in sorted((registry.folder / RELEASES).glob("*")):
        yield folder, reasons.get(folder.name, "")


def approvals(registry: Registry, kept: Container[str]) -> Iterator[tuple[Path, str]]:
    """Every question about a model, with why it stays; with no reason if it may go.

    A question stays while it is open, and while the decision that it led to stays: without its answer a run that comes
    to that decision again would have to ask again.

    Args:
        registry: The registry of the model.
        kept: Artifacts that stay or are still to be made, `kind/key`.
    """
    for path in sorted((registry.folder / APPROVALS).glob("[!.]*.json")):
        try:
            request = read_request(registry, path.stem)
        except ConfigError:
            yield path, "a question that can't be read"
            continue
        if request is None:
            continue
        why = f"run {request.run} asks" if request.is_open else ""
        yield path, why or (f"of promote/{request.key}" if f"promote/{request.key}" in kept else "")


def _artifact(folder: Path) -> str:
    """`export/key` of a release; empty of what is none."""
    try:
        return Release.read(folder).artifact
    except ValueError:
        return ""
