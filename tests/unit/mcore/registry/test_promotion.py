"""What is promoted and what is not, with its reason; a rollback restores the former model or is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mcore.artifacts import Store
from mcore.errors import ConfigError, GateError
from mcore.registry.aliases import Registry
from mcore.registry.promotion import Decision, promote, rollback
from mcore.registry.release import release_problems
from tests.unit.mcore.registry.judged_runs import comparison, through


def production(artifacts: dict[str, str], **options: Any) -> Decision:
    return promote(Store("store"), artifacts["export"], "production", model="small", **options)


def registry() -> Registry:
    return Registry(Store("store"), "small")


def served() -> str:
    """Artifact that the stable path leads to, by its files."""
    path = Path("store/registry/small/production/config.json").resolve()
    return f"export/{path.parent.name}"


def test_only_what_is_better_than_production_is_promoted(raw: dict[str, Any]) -> None:
    _, first = through(raw, train__seed=1)
    _, better = through(raw, answers=comparison("1110"), train__seed=2)
    _, worse = through(raw, answers=comparison("0011"), train__seed=3)
    assert production(first).promoted and served() == first["export"]
    decision = production(better)
    assert decision.promoted and served() == better["export"] and decision.before == first["export"]
    assert {name: decision.figures[name] for name in ("cases", "won", "lost")} == {"cases": 4, "won": 1, "lost": 0}
    refused = production(worse)
    assert not refused.promoted and served() == better["export"]
    assert refused.reason.startswith(f"not better: 1 of 4 cases won and 2 lost against production ({better['export']})")
    assert [(move.action, move.artifact) for move in registry().history()] == [
        ("promoted", first["export"]),
        ("promoted", better["export"]),
    ]


@pytest.mark.parametrize(("perplexity", "is_better"), [(1.9, True), (2.0, False), (2.1, False), (None, False)])
def test_perplexity_decides_between_models_that_win_as_much_as_they_lose(
    raw: dict[str, Any], perplexity: float | None, is_better: bool
) -> None:
    _, first = through(raw, answers=comparison("1100"), train__seed=1)
    production(first)
    _, second = through(raw, answers=comparison("0110", perplexity=perplexity), train__seed=2)
    decision = production(second)
    assert decision.promoted is is_better and decision.reason, decision
    assert (served() == second["export"]) is is_better


def test_another_alias_is_held_against_production_too(raw: dict[str, Any]) -> None:
    _, first = through(raw, train__seed=1)
    _, worse = through(raw, answers=comparison("1000", limit=0.25), train__seed=2)
    production(first)
    store = Store("store")
    assert promote(store, first["export"], "staging", model="small").promoted
    assert not promote(store, worse["export"], "candidate", model="small").promoted
    assert registry().points_to("candidate") is None


def test_models_that_were_not_asked_the_same_are_not_compared_but_a_person_may_decide(raw: dict[str, Any]) -> None:
    _, first = through(raw, train__seed=1)
    production(first)
    Path("suite.yaml").write_text(Path("suite.yaml").read_text().replace("Who are you?", "Your name?"))
    _, other = through(raw, answers=comparison("1111"), train__seed=2)
    decision = production(other)
    assert not decision.promoted and "evaluate.suite is another" in decision.reason and served() == first["export"]
    assert production(other, because="the suite grew").promoted and served() == other["export"]
    assert registry().history()[-1].reason.startswith("the suite grew (can't be compared")


def damage(path: Path) -> None:
    """Flip one bit, with size and modification time as they were."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)


NO_GATE = {"answers": comparison("1111", limit=None)}
FAILED_GATE = {"answers": comparison("1000")}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"proven": {"passed": False}}, "passed in its report: expected true, found False"),
    ({"proven": {"num_differing_tensors": 1}}, "tensors that differ: expected 0, found 1"),
    ({"proven": {"relative_error": 2e-4}}, "error of its logits: expected at most 0.0001, found 0.0002"),
    ({"proven": {"relative_error": None}}, "error of its logits: expected at most 0.0001, found None"),
    ({"proven": {"relative_error": float("nan")}}, "error of its logits: expected at most 0.0001, found nan"),
    (FAILED_GATE, "min_pass_rate of all cases: expected 0.5, found 0.25"),
    (NO_GATE, "expected a gate"),
    ({"until": "compare"}, "an evaluation beside a base, with gates, found none in the store"),
    ({"until": "verify_export"}, "expected a proof of it"),
]


def test_a_gate_that_did_not_say_yes_leaves_the_alias(raw: dict[str, Any]) -> None:
    _, first = through(raw, train__seed=1)
    production(first)
    history = Path("store/registry/small/history.jsonl").read_text()
    for seed, (options, found) in enumerate(REFUSED, 2):
        _, other = through(raw, train__seed=seed, **options)
        with pytest.raises(GateError) as error:
            production(other, because="nobody may pass over a gate")
        assert found in str(error.value)
        assert served() == first["export"] and Path("store/registry/small/history.jsonl").read_text() == history


def test_what_is_damaged_or_gone_speaks_for_nothing(raw: dict[str, Any]) -> None:
    _, artifacts = through(raw)
    for stage in ("export", "verify_convert", "verify_export", "compare"):
        folder = Path("store", artifacts[stage])
        shutil.copytree(folder, f"whole/{stage}")
        damage(folder / "file")
        with pytest.raises(GateError, match="content changed since it was made"):
            production(artifacts, fresh=True)
        shutil.rmtree(folder)
        with pytest.raises(GateError, match=r"a whole artifact|none in the store"):
            production(artifacts)
        shutil.copytree(f"whole/{stage}", folder)
    assert registry().points_to("production") is None
    assert production(artifacts, fresh=True).promoted


def test_proofs_of_what_was_made_again_since_do_not_count(raw: dict[str, Any]) -> None:
    _, artifacts = through(raw)
    shutil.rmtree(Path("store", artifacts["export"]))
    through(raw, weights="other weights under the same key")
    with pytest.raises(GateError) as error:
        production(artifacts)
    assert f"{artifacts['verify_export']}, its hf: expected the content that it was made of" in str(error.value)


def test_the_proofs_of_another_model_do_not_count(raw: dict[str, Any]) -> None:
    _, first = through(raw, train__seed=1)
    _, second = through(raw, train__seed=2)
    given = {"proof": first["verify_export"], "comparison": first["compare"]}
    with pytest.raises(GateError) as error:
        production(second, given=given)
    assert str(error.value).count("one that is missing or of something else") == 2


def test_only_exports_are_promoted(raw: dict[str, Any]) -> None:
    _, artifacts = through(raw)
    with pytest.raises(ConfigError, match="only an exported model"):
        promote(Store("store"), artifacts["train"], "production", model="small")
    for name in ("..", "a/b", "A", ""):
        with pytest.raises(ConfigError, match="no name of a model"):
            promote(Store("store"), artifacts["export"], "production", model=name)


def test_again_nothing_moves_and_a_damaged_card_is_written_again(raw: dict[str, Any]) -> None:
    _, artifacts = through(raw)
    assert production(artifacts).promoted
    card = Path("store/registry/small/production/README.md")
    text = card.read_text()
    assert production(artifacts).reason == "production is this model already"
    card.write_text("another card")
    assert production(artifacts).promoted and card.read_text() == text
    assert len(registry().history()) == 1


def test_the_same_weights_of_another_run_do_not_move_it(raw: dict[str, Any]) -> None:
    _, first = through(raw, train__seed=1, weights="same")
    _, second = through(raw, train__seed=2, weights="same")
    production(first)
    decision = production(second, because="though it is the same")
    assert not decision.promoted and decision.reason == f"production has these weights already, as {first['export']}"
    assert served() == first["export"] and len(registry().history()) == 1


def test_rollback_goes_back_through_what_was_promoted(raw: dict[str, Any]) -> None:
    answers = ("1100", "1110", "1111")
    made = [through(raw, answers=comparison(one), train__seed=seed)[1]["export"] for seed, one in enumerate(answers)]
    for export in made:
        promote(Store("store"), export, "production", model="small")
    store = Store("store")
    for expected, gone in ((made[1], made[2]), (made[0], made[1])):
        after, before = rollback(store, registry(), "production", reason="it is rude")
        assert (after.artifact, before) == (expected, gone) and served() == expected
    with pytest.raises(GateError, match="only the present one"):
        rollback(store, registry(), "production", reason="more")
    with pytest.raises(GateError, match="nothing was promoted"):
        rollback(store, registry(), "staging", reason="more")
    assert [move.action for move in registry().history()] == ["promoted"] * 3 + ["rolled back"] * 2


def test_what_was_rolled_back_comes_back_by_hand_only(raw: dict[str, Any]) -> None:
    _, first = through(raw, train__seed=1)
    _, better = through(raw, answers=comparison("1111"), train__seed=2)
    production(first)
    production(better, by_itself=True)
    rollback(Store("store"), registry(), "production", reason="it is rude")
    refused = production(better, by_itself=True)
    assert not refused.promoted and "it was rolled back by" in refused.reason and served() == first["export"]
    assert production(better).promoted and served() == better["export"]
    after, _ = rollback(Store("store"), registry(), "production", reason="still")
    assert after.artifact == first["export"]


def test_rollback_is_refused_if_the_former_model_is_not_whole(raw: dict[str, Any]) -> None:
    _, first = through(raw, train__seed=1)
    _, better = through(raw, answers=comparison("1111"), train__seed=2)
    production(first)
    former = registry().release_folder(registry().points_to("production") or "")
    production(better)
    export = Path("store", first["export"])
    shutil.copytree("store", "whole", symlinks=True)
    damages = {
        "content changed since it was made": lambda: damage(export / "file"),
        "not made yet": lambda: shutil.rmtree(export),
        "another text": lambda: (former / "README.md").write_text("another"),
        "a link to": lambda: (former / "config.json").unlink(),
        "release.json can't be read": lambda: (former / "release.json").unlink(),
        "it was made again since": lambda: [shutil.rmtree(export), through(raw, train__seed=1, weights="otherwise")],
    }
    for found, spoil in damages.items():
        spoil()
        with pytest.raises(GateError, match="the former model is not whole") as error:
            rollback(Store("store"), registry(), "production", reason="it is rude")
        assert found in str(error.value) and served() == better["export"]
        shutil.rmtree("store")
        shutil.copytree("whole", "store", symlinks=True)
    assert rollback(Store("store"), registry(), "production", reason="it is rude")[0].artifact == first["export"]


def test_a_release_is_links_beside_a_card_and_leaves_the_artifact_as_it_was(raw: dict[str, Any]) -> None:
    _, artifacts = through(raw)
    export = Path("store", artifacts["export"])
    before = {path: (path.lstat().st_ctime_ns, path.lstat().st_nlink) for path in export.rglob("*")}
    production(artifacts)
    folder = Path("store/registry/small/production")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    manifest = json.loads((export / "manifest.json").read_text())
    assert names == {*manifest["files"], "README.md", "release.json"}
    for name in manifest["files"]:
        assert (folder / name).is_symlink() and (folder / name).resolve() == (export / name).resolve()
        assert not (folder / name).readlink().is_absolute()
    assert {path: (path.lstat().st_ctime_ns, path.lstat().st_nlink) for path in export.rglob("*")} == before
    assert release_problems(Store("store"), folder.resolve(), fresh=True) == []
