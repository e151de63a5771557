"""What is collected and what stays, in every state of a store; a collection that is killed leaves no half."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mcore.artifacts import Store
from mcore.registry.aliases import Registry
from mcore.registry.approval import answer, ask, questions
from mcore.registry.gates import evidence
from mcore.registry.promotion import promote, rollback
from mcore.retention import TRASH, collect, holdings
from mcore.runs import begin
from tests.unit.flows.command_line import mcore_flows
from tests.unit.flows.made_runs import checked_run, finish, record_of
from tests.unit.mcore.registry.judged_runs import comparison, through
from tests.unit.tasks.model_folders import listing


def attempt(raw: dict[str, Any], loss: float, **changes: Any) -> dict[str, str]:
    """A run that is done; its artifacts by stage."""
    checked = checked_run(raw, **changes)
    finish(checked, metrics={"train": {"best_validation_loss": loss}})
    return {plan.name: plan.artifact for plan in checked.stages}


def names(store: Store) -> set[str]:
    return {f"{one.kind}/{one.key}" for one in store.manifests()}


def why(store: Store, keep_last: int = 0) -> dict[str, str]:
    return {f"{one.kind}/{one.key}": one.why for one in holdings(store, keep_last=keep_last)}


def test_only_what_no_run_and_nobody_else_needs_goes(raw: dict[str, Any]) -> None:
    best = attempt(raw, 0.1, train__seed=1)
    worse = attempt(raw, 0.5, train__seed=2)
    newest = attempt(raw, 0.3, train__seed=3)
    other = attempt(raw, 0.9, name="other", train__seed=4)
    store = Store("store")
    reasons = why(store)
    assert reasons[newest["train"]] == "published by small" and reasons[other["compare"]] == "published by other"
    assert reasons[best["train"]] == reasons[best["export"]] == "best by validation loss"
    lost = {worse[name] for name in ("train", "select", "export", "verify_export", "evaluate_tuned", "compare")}
    assert {name for name, one in reasons.items() if not one} == lost
    before = names(store)
    gone, in_use = collect(store, keep_last=0)
    assert {f"{one.kind}/{one.key}" for one in gone} == lost and in_use == []
    assert names(store) == before - lost and not list((store.root / TRASH).iterdir())
    assert all(store.status(*name.split("/")).state == "valid" for name in names(store))
    assert collect(store, keep_last=0) == ([], [])


def test_what_aliases_point_to_and_would_be_rolled_back_to_stays(raw: dict[str, Any]) -> None:
    answers = [comparison(passed) for passed in ("1100", "1110", "1111")]
    made = [through(raw, answers=one, train__seed=seed)[1] for seed, one in enumerate(answers)]
    attempt(raw, 0.3, train__seed=9)  # the run's newest attempt, which published another
    store = Store("store")
    for one in made:
        assert promote(store, one["export"], "production", model="small").promoted
    reasons = why(store)
    for one, expected in zip(made, ("", "production of small before", "production of small"), strict=True):
        own = {
            reasons[one[stage]] for stage in ("train", "select", "export", "verify_export", "evaluate_tuned", "compare")
        }
        assert own == {expected}
    collect(store, keep_last=0)
    assert rollback(store, Registry(store, "small"), "production", reason="test")[0].artifact == made[1]["export"]
    assert evidence(store, made[1]["export"], fresh=True) and not store.path("export", made[0]["export"][7:]).exists()
    assert why(store)[made[1]["train"]] == "production of small"
    assert not [one for one in holdings(store, keep_last=0) if one.kind == "registry"]


def test_releases_stay_that_an_alias_can_come_to_and_questions_whose_decision_stays(raw: dict[str, Any]) -> None:
    answers = [comparison(passed) for passed in ("1100", "1110", "1111")]
    runs = [through(raw, answers=one, train__seed=seed) for seed, one in enumerate(answers)]
    store, registry = Store("store"), Registry(Store("store"), "small")
    keys = [next(plan.key for plan in checked.stages if plan.name == "promote") for checked, _ in runs]
    made = []
    for (_, one), key in zip(runs, keys, strict=True):
        ask(registry, key, run="small", alias="production", artifact=one["export"], summary="better", timeout_s=60.0)
        answer(registry, key, "approved", by="ann")
        assert promote(store, one["export"], "production", model="small").promoted
        made.append(str(registry.points_to("production")))
    ask(registry, "0" * 20, run="open", alias="production", artifact="export/0", summary="better", timeout_s=60.0)
    killed = registry.release_folder(".half")
    killed.mkdir()
    expected = {
        f"release/small/{made[0]}": "",  # its model goes, too
        f"release/small/{made[1]}": "production of small before",
        f"release/small/{made[2]}": "production of small",
        "release/small/.half": "",
        f"approval/small/{keys[0]}": "",
        f"approval/small/{keys[1]}": "",
        f"approval/small/{keys[2]}": f"of promote/{keys[2]}",  # the newest attempt has still to decide
        f"approval/small/{'0' * 20}": "run open asks",
    }
    found = {name: one for name, one in why(store).items() if name.startswith(("release", "approval"))}
    assert found == expected
    with registry.locked():  # somebody is about to move an alias: what he may need is left alone
        _, in_use = collect(store, keep_last=0)
        assert {f"{one.kind}/{one.key}" for one in in_use} == {name for name, one in expected.items() if not one}
    gone, in_use = collect(store, keep_last=0)
    assert in_use == [] and {f"{one.kind}/{one.key}" for one in gone} == {n for n, one in expected.items() if not one}
    assert not killed.exists() and not registry.release_folder(made[0]).exists()
    assert [request.key for request in questions(registry)] == [keys[2], "0" * 20]
    assert rollback(store, registry, "production", reason="test")[0].id == made[1] and len(registry.history()) == 4
    # What was rolled back is no way to come to any more; promoted again it is made again.
    assert why(store)[f"release/small/{made[2]}"] == ""
    collect(store, keep_last=0)
    assert promote(store, runs[2][1]["export"], "production", model="small", because="test").promoted
    assert (registry.link("production") / "README.md").is_file()


def test_the_last_of_each_kind_stay_with_what_they_were_made_from(raw: dict[str, Any]) -> None:
    attempt(raw, 0.1, train__seed=1)
    worse = attempt(raw, 0.5, train__seed=2)
    attempt(raw, 0.3, train__seed=3)
    assert why(Store("store"), keep_last=2)[worse["train"]] == "among the last 2"
    assert why(Store("store"), keep_last=1)[worse["train"]] == ""


def test_what_was_published_stays_while_the_newest_attempt_failed(raw: dict[str, Any]) -> None:
    good = attempt(raw, 0.5, train__seed=1)
    failed = checked_run(raw, train__seed=2)
    finish(failed, "failed", until="export")
    reasons = why(Store("store"))
    assert reasons[good["train"]] == reasons[good["compare"]] == "published by small"
    trained = next(plan.artifact for plan in failed.stages if plan.name == "train")
    assert reasons[trained] == "of run small"


def test_what_is_in_use_stays(raw: dict[str, Any]) -> None:
    attempt(raw, 0.1, train__seed=1)
    worse = attempt(raw, 0.5, train__seed=2)
    attempt(raw, 0.3, train__seed=3)
    store = Store("store")
    kind, key = worse["train"].split("/")
    with store.lock(kind, key, run="nightly"):
        assert why(store)[worse["train"]] == "in use by run nightly"
        gone, in_use = collect(store, keep_last=0)
        assert worse["train"] in names(store) and in_use == [] and len(gone) == 5
    worse = attempt(raw, 0.5, train__seed=2)
    attempt(raw, 0.3, train__seed=3)
    checked = checked_run(raw, name="again", train__seed=2)
    begin(store, record_of(checked))
    with store.lock("run", "again"):
        reasons = why(store)
        assert {reasons[artifact] for artifact in worse.values()} == {"in use by run again"}
        assert collect(store, keep_last=0) == ([], [])


def test_unfinished_training_stays_while_a_run_would_go_on_from_it(raw: dict[str, Any]) -> None:
    checked = checked_run(raw)
    finish(checked, "stopped", until="train")
    store = Store("store")
    plan = next(plan for plan in checked.stages if plan.name == "train")
    for key in (plan.key, "0" * 20):
        folder = store.partial("train", key)
        folder.mkdir(parents=True)
        (folder / "iter").write_text("x" * 100)
    left = {one.path.name: (one.why, one.num_bytes) for one in holdings(store, keep_last=0) if not one.created}
    assert left == {f"train-{plan.key}": ("run small would go on from it", 100), f"train-{'0' * 20}": ("", 100)}
    collect(store, keep_last=0)
    assert store.partial("train", plan.key).is_dir() and not store.partial("train", "0" * 20).exists()


def test_what_has_no_manifest_goes_and_the_rest_of_a_killed_collection_too(raw: dict[str, Any]) -> None:
    attempt(raw, 0.1)
    store = Store("store")
    (store.root / "train" / "broken").mkdir()
    (store.root / TRASH / "train-old").mkdir(parents=True)
    gone, _ = collect(store, keep_last=0)
    assert [one.path.name for one in gone] == ["broken"] and not list((store.root / TRASH).iterdir())


def test_what_a_killed_command_left_of_its_output_goes_unless_a_run_would_go_on(raw: dict[str, Any]) -> None:
    checked = checked_run(raw)
    finish(checked, "stopped", until="export")
    store = Store("store")
    (plan,) = [plan for plan in checked.stages if plan.name == "export"]
    left = store.root / ".partial" / f".export-{plan.key}.partial"
    other = store.root / ".partial" / ".convert-0123456789abcdef0123.partial"
    for folder in (left, other):
        folder.mkdir(parents=True)
    gone, _ = collect(store, keep_last=0)
    assert [one.path for one in gone] == [other] and left.exists() and not other.exists()


KILLED = """
import os, signal, sys
from mcore import retention
from mcore.artifacts import Store
def remove(path):
    os.kill(os.getpid(), signal.SIGKILL)
retention.remove = remove
retention.collect(Store(sys.argv[1]), keep_last=0)
"""


def test_a_collection_that_is_killed_leaves_whole_artifacts_or_none(raw: dict[str, Any]) -> None:
    attempt(raw, 0.1, train__seed=1)
    worse = attempt(raw, 0.5, train__seed=2)
    attempt(raw, 0.3, train__seed=3)
    store = Store("store")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(store.root)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert store.status(*worse["train"].split("/")).state == "missing" and list((store.root / TRASH).iterdir())
    assert worse["train"] not in names(store)
    collect(store, keep_last=0)
    assert not list((store.root / TRASH).iterdir())


def test_the_command(raw: dict[str, Any]) -> None:
    assert mcore_flows("artifacts", "gc", "--dry-run", cwd=Path.cwd()).returncode == 2  # no store
    attempt(raw, 0.1, train__seed=1)
    worse = attempt(raw, 0.5, train__seed=2)
    attempt(raw, 0.3, train__seed=3)
    before = listing(Path.cwd())
    dry = mcore_flows("artifacts", "gc", "--dry-run", "--keep-last", 0, cwd=Path.cwd())
    assert dry.returncode == 0 and listing(Path.cwd()) == before
    assert worse["train"] in dry.stdout and "6 folders, " in dry.stdout and "kB would be freed" in dry.stdout
    assert "published by small" in dry.stdout and "best by validation loss" in dry.stdout
    unasked = mcore_flows("artifacts", "gc", "--keep-last", 0, cwd=Path.cwd())
    assert unasked.returncode == 2 and "--yes" in unasked.stderr and listing(Path.cwd()) == before
    done = mcore_flows("artifacts", "gc", "--keep-last", 0, "--yes", cwd=Path.cwd())
    assert done.returncode == 0 and " freed\n" in done.stdout and not Path("store", worse["train"]).exists()
    listed = mcore_flows("artifacts", "verify", cwd=Path.cwd())
    assert listed.returncode == 0, listed.stderr
    assert json.loads(mcore_flows("status", "small", "--json", cwd=Path.cwd()).stdout)["state"] == "done"


def test_the_best_is_told_among_trainings_with_the_same_validation_rows(raw: dict[str, Any]) -> None:
    best = attempt(raw, 0.1, train__seed=1)
    Path("other.jsonl").write_text(Path("val.jsonl").read_text() * 2)
    other = attempt(raw, 0.4, train__seed=2, data__val_dataset=["other.jsonl"])
    worse = attempt(raw, 0.5, train__seed=3, data__val_dataset=["other.jsonl"])
    attempt(raw, 0.9, train__seed=4, data__val_dataset=["other.jsonl"])
    reasons = why(Store("store"))
    assert reasons[best["train"]] == reasons[other["train"]] == "best by validation loss"
    assert reasons[worse["train"]] == ""
