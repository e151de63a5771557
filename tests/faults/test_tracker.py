"""A tracker that says something else than what is there: training goes on from what is whole, to the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mcore.select import TRACKER, iterations_in, read_tracker
from tests.faults.conftest import Undisturbed
from tests.faults.disturbed import Disturbed, ended_at, told, wait_for_iteration
from tests.faults.server_runs import RUN

pytestmark = [pytest.mark.faults, pytest.mark.endurance]  # short: tests/unit/mcore/test_select.py

TRACKERS: dict[str, bytes | None] = {
    "garbage": b"\x00\xff\xfe twenty\n",
    "ahead of the data": b"80",
    "release": b"release",
    "empty": b"",
    "far ahead": b"999999999999",
    "behind the data": b"20",
    "missing": None,
}


@pytest.fixture(scope="module")
def killed(workspace: Path, prefect_api_url: str) -> Disturbed:
    """A run that was killed behind its second checkpoint."""
    run = Disturbed(workspace, "tracked", RUN, api_url=prefect_api_url)
    run.start()
    wait_for_iteration(run.store.root, 50)
    run.kill_all()
    assert ended_at(told(run.store, "tiny")) == ("lost", "train")
    return run


@pytest.mark.parametrize("tracker", TRACKERS)
def test_training_goes_on_from_what_is_whole(
    workspace: Path, undisturbed: Undisturbed, killed: Disturbed, prefect_api_url: str, tracker: str
) -> None:
    expected = undisturbed(RUN).exported()
    name = f"tracker {tracker}".replace(" ", "-")
    shutil.copytree(killed.store.root, workspace / name, symlinks=True)
    run = Disturbed(workspace, name, RUN, api_url=prefect_api_url)
    (output,) = run.store.root.glob(".partial/train-*")
    saved = read_tracker(output)
    assert saved in {40, 60} and saved in iterations_in(output)
    said = TRACKERS[tracker]
    if said is None:
        (output / TRACKER).unlink()
    else:
        (output / TRACKER).write_bytes(said)
    run.finish(expected)
    log = (run.store.run_dir("tiny") / "train" / "stage.log").read_text()
    assert f"resuming behind iteration {saved}" in log or tracker == "behind the data"
