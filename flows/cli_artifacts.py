"""`mcore-flows artifacts`: what the store holds, where it came from, and whether it is whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.estimates import size_of
from flows.tables import plain_table
from flows.tables import show as show_table
from mcore.artifacts import Manifest, Store
from mcore.errors import ArtifactError, ConfigError, Problem
from mcore.progress import progress
from mcore.retention import Holding, artifact_folders, collect, holdings
from mcore.wording import counted, moment, size

artifacts = typer.Typer(help="List, show and check what the store holds.", no_args_is_help=True)

StoreFolder = Annotated[Path, typer.Option("--store", metavar="DIR", help="Folder of the artifact store.")]
Names = Annotated[list[str] | None, typer.Argument(metavar="[KIND/KEY]…", help="Artifacts; a key may be cut short.")]
STORE = Path("store")


@artifacts.command("list")
def list_artifacts(
    kind: Annotated[str | None, typer.Option(help="Only artifacts of this kind.")] = None, store: StoreFolder = STORE
) -> None:
    """List all artifacts, oldest first."""
    found = [manifest for manifest in _by_time(Store(store).manifests()) if kind in (None, manifest.kind)]
    table = plain_table("artifact", "made (UTC)", "took", "files", "size", "from", right=("took", "files", "size"))
    for manifest in found:
        table.add_row(
            f"{manifest.kind}/{manifest.key}",
            moment(manifest.created),
            f"{manifest.duration_s:.1f} s",
            str(len(manifest.files)),
            size(size_of(manifest)),
            ", ".join(
                f"{kind}/{key[:8]}" for kind, _, key in (name.partition("/") for name in manifest.inputs.values())
            ),
        )
    show_table(table)
    typer.echo(f"{counted(len(found), 'artifact')}, {size(sum(map(size_of, found)))}")


@artifacts.command()
def show(
    name: Annotated[str, typer.Argument(metavar="KIND/KEY", help="The artifact; the key may be cut short.")],
    store: StoreFolder = STORE,
) -> None:
    """Print an artifact's manifest as JSON: where it came from, its figures, its files."""
    opened = Store(store)
    ((kind, key),) = named_artifacts(opened, [name])
    status = opened.status(kind, key)
    if status.manifest is None:
        raise ArtifactError("the artifact is damaged", [Problem(f"{kind}/{key}", "a whole artifact", status.why)])
    typer.echo(json.dumps({"path": str(opened.path(kind, key)), **asdict(status.manifest)}, indent=2))


@artifacts.command()
def verify(names: Names = None, store: StoreFolder = STORE) -> None:
    """Read every file of all artifacts, or of those named, and compare it with its checksum."""
    opened = Store(store)
    chosen = named_artifacts(opened, names) if names else _present(opened)
    problems, num_bytes = [], 0
    with progress("verify", len(chosen), "artifacts") as advance:
        for kind, key in chosen:
            status = opened.status(kind, key, fresh=True)
            if status.manifest is None:
                problems.append(Problem(f"{kind}/{key}", "a whole artifact", status.why))
            else:
                num_bytes += size_of(status.manifest)
            advance(1, f"{kind}/{key[:8]}")
    if chosen:
        opened.digests.save()
    if problems:
        raise ArtifactError("artifacts are damaged; a run that needs them makes them again", problems)
    typer.echo(
        f"{counted(len(chosen), 'artifact')} {'is' if len(chosen) == 1 else 'are'} whole, {size(num_bytes)} read"
    )


@artifacts.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    keep_last: Annotated[
        int, typer.Option(min=0, help="So many of each kind stay whatever they are, the newest, with their inputs.")
    ] = 2,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Delete without asking; for where nobody is to ask.")
    ] = False,
    store: StoreFolder = STORE,
) -> None:
    """Delete what nobody needs; shows it, and asks first.

    Stays: what aliases point to and could be rolled back to, what runs published, what their newest attempts made or
    would go on from, the best training of each base and validation set, the newest of each kind, and what is in use.
    """
    opened = Store(store)
    if not opened.root.is_dir():
        raise ConfigError("there is no store", [Problem(str(opened.root), "a folder", "none")])
    before = holdings(opened, keep_last=keep_last)
    gone = [one for one in before if not one.why]
    in_use: list[Holding] = []
    if not dry_run and gone and not yes and not _agreed(gone):
        typer.echo("nothing was deleted")
        return
    if not dry_run:
        gone, in_use = collect(opened, keep_last=keep_last)
    show_table(_going(gone, "goes" if dry_run else "gone"))
    typer.echo(f"{_room(gone)} {'would be freed' if dry_run else 'freed'}\n")
    for one in in_use:
        typer.echo(f"{one.kind}/{one.key} stays: somebody has just begun to make it")
    show_table(_kept(one for one in before if one.why))


def _agreed(going: list[Holding]) -> bool:
    """Whether somebody at the terminal says yes.

    Raises:
        ConfigError: There is nobody.
    """
    if not sys.stdin.isatty():
        fix = f"Nothing was deleted; {_room(going)} would be freed."
        raise ConfigError("nobody can be asked", [Problem("artifacts gc", "--yes, or --dry-run", "neither", fix)])
    show_table(_going(going, "goes"))
    return typer.confirm(f"Delete {_room(going)}?")


def _going(going: Iterable[Holding], title: str) -> Table:
    table = plain_table(title, "made (UTC)", "size", right=("size",))
    for one in going:
        unfinished = " (unfinished)" if one.path.parent.name.startswith(".") else ""
        made = moment(one.created) if one.created else ""
        table.add_row(f"{one.kind}/{one.key}{unfinished}", made, size(one.num_bytes))
    return table


def _room(going: list[Holding]) -> str:
    return f"{counted(len(going), 'folder')}, {size(sum(one.num_bytes for one in going))}"


def _kept(kept: Iterable[Holding]) -> Table:
    """What stays, by reason."""
    by_why: dict[str, list[int]] = {}
    for one in kept:
        by_why.setdefault(one.why, []).append(one.num_bytes)
    table = plain_table("stays", "folders", "size", right=("folders", "size"))
    for why, sizes in by_why.items():
        table.add_row(why, str(len(sizes)), size(sum(sizes)))
    return table


def _by_time(manifests: Iterable[Manifest]) -> list[Manifest]:
    """Oldest first; of several of one moment, what went into others before these."""
    by_name = {f"{manifest.kind}/{manifest.key}": manifest for manifest in manifests}

    @cache
    def depth(name: str) -> int:
        return 1 + max(map(depth, by_name[name].inputs.values()), default=0) if name in by_name else 0

    return sorted(by_name.values(), key=lambda m: (m.created, depth(f"{m.kind}/{m.key}")))


def _present(store: Store) -> list[tuple[str, str]]:
    """Kind and key of every artifact folder, whole or not."""
    return [(folder.parent.name, folder.name) for folder in artifact_folders(store)]


def named_artifacts(store: Store, names: list[str]) -> list[tuple[str, str]]:
    """The artifacts that are meant, each by one name."""
    chosen, problems, present = [], [], _present(store)
    for name in names:
        matches = [(kind, key) for kind, key in present if f"{kind}/{key}".startswith(name)]
        if len(matches) == 1:
            chosen += matches
        else:
            found = ", ".join(f"{kind}/{key}" for kind, key in matches) or f"none in {store.root}"
            problems.append(Problem(name, "one artifact, as `artifacts list` names it", found))
    if problems:
        raise ConfigError("no such artifact", problems)
    return chosen
