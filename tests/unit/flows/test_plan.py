"""What a run would do and why, against stores in every state."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.plan import Decision, decide
from mcore.artifacts import Manifest, Store, publish_link
from tasks.graph import StagePlan
from tasks.preflight import check_run
from tests.unit.tasks.model_folders import listing, write_rows


def decisions(raw: dict[str, Any], **changes: Any) -> dict[str, Decision]:
    copy = json.loads(json.dumps(raw))
    for name, value in changes.items():
        group, _, field = name.partition("__")
        copy.setdefault(group, {})[field] = value
    return {decision.stage.name: decision for decision in decide(check_run(copy))}


def make(raw: dict[str, Any], **changes: Any) -> dict[str, StagePlan]:
    """Run the run, as far as the store can tell."""
    plans = {name: decision.stage for name, decision in decisions(raw, **changes).items()}
    Store("store").run_dir(raw["name"]).mkdir(parents=True, exist_ok=True)
    for plan in plans.values():
        store = Store("store")
        if store.find(plan.kind, plan.key) is None:
            folder = store.partial(plan.kind, plan.key)
            folder.mkdir(parents=True)
            (folder / "file").write_text(plan.name)
            content = {f"{manifest.kind}/{manifest.key}": manifest.content for manifest in store.manifests()}
            store.commit(
                plan.kind, plan.key, inputs=plan.inputs,
                input_content={role: content.get(artifact, "") for role, artifact in plan.inputs.items()},
                ingredients=plan.ingredients, metrics={}, versions={}, duration_s=0,
            )  # fmt: skip
    return plans


def running(found: dict[str, Decision]) -> list[str]:
    return [name for name, decision in found.items() if decision.action == "RUN"]


def test_nothing_is_there_and_nothing_is_written(raw: dict[str, Any]) -> None:
    before = listing(Path.cwd())
    found = decisions(raw)
    assert running(found) == list(found) == [
        "prepare", "convert", "verify_convert", "train", "select", "export", "verify_export", "evaluate_base",
        "evaluate_tuned", "compare",
    ]  # fmt: skip
    assert {decision.why for decision in found.values()} == {"new run"}
    assert listing(Path.cwd()) == before


def test_everything_is_reused(raw: dict[str, Any]) -> None:
    make(raw)
    found = decisions(raw)
    assert running(found) == []
    assert all(decision.why.startswith("made 2") and decision.why.endswith(" UTC") for decision in found.values())
    assert running(decisions(raw, launch__retries=7)) == []


FROM_TRAIN = ["train", "select", "export", "verify_export", "evaluate_tuned", "compare"]


def test_a_changed_field_is_named_and_what_follows_says_so(raw: dict[str, Any]) -> None:
    make(raw)
    found = decisions(raw, train__lr=1.0e-3, train__lr_decay_style="linear")
    assert running(found) == FROM_TRAIN
    assert found["train"].why == "train.lr: 1e-05 -> 0.001; train.lr_decay_style: cosine -> linear"
    assert found["select"].why == "its input changes: train"
    assert found["export"].why == "its input changes: train, select"
    assert found["verify_export"].why == "its input changes: export, train, select"
    assert found["compare"].why == "its input changes: evaluate_tuned"


def test_the_most_like_of_the_earlier_artifacts_is_compared(raw: dict[str, Any]) -> None:
    make(raw)
    make(raw, train__lr=1.0e-3, train__seed=1)
    make(raw, train__lr=2.0e-3, train__seed=2, train__weight_decay=0.0)
    assert decisions(raw, train__lr=1.0e-3, train__seed=3)["train"].why == "train.seed: 1 -> 3"
    assert decisions(raw, train__weight_decay=0.5)["train"].why == "train.weight_decay: 0.1 -> 0.5"


def test_what_the_run_published_last_is_compared_rather_than_what_is_most_like(raw: dict[str, Any]) -> None:
    plans = make(raw)
    folder = Store("store").run_dir(raw["name"])
    publish_link(folder / "model", Store("store").path("export", plans["export"].key))
    make(raw, train__lr=1.0e-3, train__seed=1, evaluate__max_tokens=5)
    found = decisions(raw, train__lr=1.0e-3, train__seed=2, evaluate__max_tokens=6)
    assert found["train"].why == "train.lr: 1e-05 -> 0.001; train.seed: 42 -> 2"
    assert found["evaluate_tuned"].why == "evaluate.max_tokens: 64 -> 6; its input changes: export"
    assert found["verify_export"].why == "its input changes: export, train, select"


def test_a_run_of_a_new_name_is_compared_with_nothing(raw: dict[str, Any]) -> None:
    make(raw)
    found = decisions(raw | {"name": "another"}, train__lr=1.0e-3)
    assert running(found) == FROM_TRAIN and {found[name].why for name in FROM_TRAIN} == {"new run"}


def test_other_files_and_other_content_are_told_from_other_values(raw: dict[str, Any]) -> None:
    make(raw)
    write_rows(Path("rows.jsonl"), 21)
    found = decisions(raw)
    assert running(found) == ["prepare", *FROM_TRAIN]
    assert found["prepare"].why == "data.dataset: other files, or other content"
    assert found["train"].why == "its input changes: prepare"
    Path("suite.yaml").write_text(Path("suite.yaml").read_text().replace("Who", "What"))
    assert decisions(raw)["evaluate_base"].why == "evaluate.suite: other files, or other content"


def test_a_changed_model_changes_everything(raw: dict[str, Any]) -> None:
    make(raw)
    config = json.loads((Path("model") / "config.json").read_text())
    (Path("model") / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    found = decisions(raw)
    assert running(found) == list(found)
    assert found["convert"].why == found["evaluate_base"].why == "its input changes: the model folder"


def test_a_stricter_proof_leaves_training_alone(raw: dict[str, Any]) -> None:
    make(raw)
    found = decisions(raw, verify__num_prompts=8)
    assert running(found) == ["verify_convert", "verify_export"]
    assert {found[name].why for name in running(found)} == {"verify.num_prompts: 4 -> 8"}


def test_damage_is_named_and_stays_where_it_is(raw: dict[str, Any]) -> None:
    plans = make(raw)
    path = Store("store").path("train", plans["train"].key) / "file"
    path.write_text("trail")
    found = decisions(raw)
    assert running(found) == ["train"]
    assert found["train"].why == "damaged: file: content changed since it was made"
    path.unlink()
    assert decisions(raw)["train"].why == "damaged: file: file is missing"


def test_what_stands_on_an_input_that_came_out_otherwise_is_made_again(raw: dict[str, Any]) -> None:
    store, trained = Store("store"), make(raw)["train"]
    folder = store.partial(trained.kind, trained.key)
    folder.mkdir()
    (folder / "file").write_text("trained on another machine")
    store.commit(
        trained.kind, trained.key, inputs=trained.inputs, input_content={}, ingredients=trained.ingredients, metrics={},
        versions={}, duration_s=0,
    )  # fmt: skip
    found = decisions(raw)
    assert running(found) == ["select", "export", "verify_export"]
    assert found["export"].why == "its input trained was made again and is another now"


def test_a_new_version_of_a_stage_is_named(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    make(raw)
    for manifest in list(Store("store").manifests()):
        if manifest.kind == "export":  # as an older version of this code made it
            folder = Store("store").path(manifest.kind, manifest.key)
            content = json.loads(manifest.to_json())
            content.pop("sha256")
            content["ingredients"]["version"] = 0
            old = Manifest(**{**content, "key": "0" * 20})
            (folder / "manifest.json").write_text(old.to_json())
            folder.rename(folder.with_name("0" * 20))
    found = decisions(raw)
    assert running(found) == ["export"]
    assert found["export"].why == "the stage works in another way (version 0 -> 1)"


def test_long_values_are_cut(raw: dict[str, Any]) -> None:
    make(raw)
    why = decisions(raw, data__system="You are a helpful bot. " * 20)["prepare"].why
    assert why.startswith("data.system: null -> You are a helpful bot.") and why.endswith("…") and len(why) < 100


def test_manifests_of_another_time_do_no_harm(raw: dict[str, Any]) -> None:
    make(raw)
    store = Store("store")
    for kind in ("train", "verify"):
        folder = store.partial(kind, "odd")
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
        store.commit(kind, "odd", inputs={}, input_content={}, ingredients={}, metrics={}, versions={}, duration_s=0)
    assert decisions(raw, train__lr=1.0)["train"].why == "train.lr: 1e-05 -> 1.0"


def test_a_stage_that_is_to_be_made_again_and_all_behind_it(raw: dict[str, Any]) -> None:
    first = make(raw)
    found = decisions(raw, launch__again={"export": "2026-11-24"})
    assert running(found) == ["export", "verify_export", "evaluate_tuned", "compare"]
    assert found["export"].why == "launch.again: 2026-11-24"
    make(raw, launch__again={"export": "2026-11-24"})
    assert running(decisions(raw, launch__again={"export": "2026-11-24"})) == []  # the word finds what was made for it
    assert running(decisions(raw, launch__again={"export": "once more"})) == running(found)
    former = Store("store").find("export", first["export"].key)
    assert former is not None and running(decisions(raw)) == []  # and the run itself what was there before
