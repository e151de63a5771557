"""`artifacts gc` as a deployment: tells what nobody needs, and deletes it only if told so."""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from mcore.artifacts import Store
from mcore.errors import ConfigError, Problem
from mcore.retention import Holding, collect, holdings
from mcore.wording import counted, moment, size


@flow(name="collect-garbage")
def collect_garbage(store: str = "store", keep_last: int = 2, delete: bool = False) -> str:
    """Show what nobody needs in the store as an artifact of this run, and delete it if `delete` is set.

    Args:
        store: Folder of the artifact store, relative to the checkout.
        keep_last: So many of each kind stay whatever they are, the newest, with their inputs.
        delete: Delete it. Otherwise it is only told.

    Raises:
        ConfigError: There is no such store, or `keep_last` is negative.
    """
    opened = Store(Path(store))
    problems = []
    if not opened.root.is_dir():
        problems.append(Problem(str(opened.root), "a folder", "none"))
    if keep_last < 0:
        problems.append(Problem("keep_last", "0 or more", str(keep_last)))
    if problems:
        raise ConfigError("no garbage can be collected", problems)
    before = holdings(opened, keep_last=keep_last)
    gone = [one for one in before if not one.why]
    if delete:
        gone, _ = collect(opened, keep_last=keep_last)
    freed = size(sum(one.num_bytes for one in gone))
    told = f"{counted(len(gone), 'folder')}, {freed} {'freed' if delete else 'would be freed'}"
    get_run_logger().info(told)
    create_markdown_artifact(_page(told, gone, [one for one in before if one.why]), key="collect-garbage")
    return told


def _page(told: str, gone: list[Holding], kept: list[Holding]) -> str:
    lines = [told, "", "| goes | made (UTC) | size |", "|---|---|---:|"]
    lines += [f"| {one.kind}/{one.key} | {moment(one.created)} | {size(one.num_bytes)} |" for one in gone]
    lines += ["", "| stays | why | size |", "|---|---|---:|"]
    lines += [f"| {one.kind}/{one.key} | {one.why} | {size(one.num_bytes)} |" for one in kept]
    return "\n".join(lines)
