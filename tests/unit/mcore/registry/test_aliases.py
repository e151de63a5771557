"""An alias points to the old model or to the new one, whenever its mover is killed; history tells what took place."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcore.artifacts import Store
from mcore.registry.aliases import Registry, models, registered
from mcore.registry.promotion import promote, rollback
from mcore.registry.release import release_problems
from tests.unit.mcore.registry.judged_runs import comparison, through

CHANGES = ("open", "os.rename", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


def in_child(work: Callable[[], object], *, killed_at: int | None = None) -> int:
    """Do something in a fork of this process. Returns how it ended: 0, or the negative of the signal.

    Args:
        work: What to do.
        killed_at: Number of the step on files, from 0, that it is killed before (SIGKILL).
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if killed_at is not None:
                steps = iter(range(killed_at))

                def before(event: str, _: object) -> None:
                    if event in CHANGES and next(steps, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(before)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.faults
def test_whenever_a_promoter_is_killed_the_alias_is_the_old_or_the_new_model(raw: dict[str, Any]) -> None:
    _, old = through(raw, train__seed=1)
    _, new = through(raw, answers=comparison("1111"), train__seed=2)

    def move() -> bool:
        return promote(Store("store"), new["export"], "production", model="small").promoted

    promote(Store("store"), old["export"], "production", model="small")
    folder = Path("store/registry")
    shutil.copytree(folder, "before", symlinks=True)
    registry = Registry(Store("store"), "small")
    seen: list[str] = []
    for step in range(1000):
        status = in_child(move, killed_at=step)
        release = registry.release("production")
        assert release is not None
        seen.append(release.artifact)
        path = registry.release_folder(release.id)
        assert release_problems(Store("store"), path) == []
        assert (registry.link("production") / "config.json").is_file()
        took_place = [move.artifact for move in registry.history()]
        assert took_place == ([old["export"]] if release.artifact == old["export"] else [old["export"], new["export"]])
        assert move()  # the same command again
        assert [line.artifact for line in registry.history()] == [old["export"], new["export"]]
        after, _ = rollback(Store("store"), registry, "production", reason="test")
        assert after.artifact == old["export"]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        shutil.rmtree(folder)
        shutil.copytree("before", folder, symlinks=True)
    else:
        pytest.fail("it never came through")
    assert step > 20 and set(seen) == {old["export"], new["export"]}
    assert seen == sorted(seen, key=[old["export"], new["export"]].index)  # old up to some step, new from there


def test_many_promoters_at_once_end_with_the_best_and_a_history_without_a_gap(raw: dict[str, Any]) -> None:
    made = []
    for number in range(5):
        answers = comparison("1" * (number + 1) + "0" * (4 - number), limit=0.0)
        made.append(through(raw, answers=answers, train__seed=number)[1]["export"])
    children = []
    for export in made:
        pid = os.fork()
        if pid == 0:
            try:
                promote(Store("store"), export, "production", model="small")
            finally:
                os._exit(0)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 5
    registry = Registry(Store("store"), "small")
    history = registry.history()
    assert [move.before for move in history] == [None, *(move.after for move in history[:-1])]
    order = [made.index(move.artifact) for move in history]
    assert order == sorted(set(order)) and order[-1] == 4
    assert registry.points_to("production") == history[-1].after


def test_history_is_only_added_to_and_a_line_that_was_cut_short_does_not_count(raw: dict[str, Any]) -> None:
    _, first = through(raw, train__seed=1)
    _, better = through(raw, answers=comparison("1111"), train__seed=2)
    store = Store("store")
    promote(store, first["export"], "production", model="small")
    path = Path("store/registry/small/history.jsonl")
    with path.open("a") as file:
        file.write('{"time": "2026')
    before = path.read_text()
    promote(store, better["export"], "production", model="small")
    assert path.read_text().startswith(before + "\n")
    registry = Registry(store, "small")
    assert [move.artifact for move in registry.history()] == [first["export"], better["export"]]


def test_a_line_whose_writer_was_killed_is_told_to_be_undone(raw: dict[str, Any]) -> None:
    _, first = through(raw, train__seed=1)
    _, better = through(raw, answers=comparison("1111"), train__seed=2)
    store = Store("store")
    promote(store, first["export"], "production", model="small")
    registry = Registry(store, "small")
    path = Path("store/registry/small/history.jsonl")
    line = json.loads(path.read_text())
    path.write_text(path.read_text() + json.dumps(line | {"before": line["after"], "after": "f" * 20}) + "\n")
    assert len(registry.history()) == 1 and registry.stack("production") == [line["after"]]
    promote(store, better["export"], "production", model="small")
    actions = [json.loads(text)["action"] for text in path.read_text().splitlines()]
    assert actions == ["promoted", "promoted", "undone", "promoted"]
    assert [move.artifact for move in registry.history()] == [first["export"], better["export"]]


def test_models_are_kept_apart_and_what_they_need_is_told(raw: dict[str, Any]) -> None:
    _, first = through(raw, train__seed=1)
    _, better = through(raw, answers=comparison("1111"), train__seed=2)
    store = Store("store")
    for model in ("one", "two"):
        promote(store, first["export"], "production", model=model)
    promote(store, better["export"], "production", model="two")
    assert models(store) == ["one", "two"]
    kept = registered(store)
    assert {why: needs[0] for why, needs in kept.items()} == {
        "production of one": first["export"],
        "production of two": better["export"],
        "production of two before": first["export"],
    }
    assert kept["production of two"][1:] == [better[name] for name in ("verify_convert", "verify_export", "compare")]
