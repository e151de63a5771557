"""What a run is asked and trained on."""

import json
from pathlib import Path

from configs.schema.run import RunConfig
from mcore.data.prepare.build import prepare
from tasks.overlap import overlap
from tests.unit.mcore.data.tokenizers_for_tests import write_hf_dir


def row(user: str, answer: str = "An answer.") -> str:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def test_prompts_and_held_out_rows_that_are_trained_are_found(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(row("Who are you,  {{NAME}}?") + row("What is the time?") + row("Why?"))
    (tmp_path / "held.jsonl").write_text(row("why?") + row("What is new?"))
    (tmp_path / "val.jsonl").write_text(row("What is new?"))
    cases = [{"prompt": prompt, "contains": ["x"]} for prompt in ("who are you, Tiny?", "What is the time", "Other?")]
    (tmp_path / "suite.yaml").write_text(json.dumps({"name": "s", "groups": [{"name": "g", "cases": cases}]}))
    run = RunConfig.model_validate(
        {
            "name": "r",
            "model": {"source": "m"},
            "data": {
                "dataset": [f"{tmp_path}/rows.jsonl"],
                "val_dataset": [f"{tmp_path}/val.jsonl"],
                "model_name": "Tiny",
            },
            "train": {"train_iters": 1},
            "evaluate": {"suite": f"{tmp_path}/suite.yaml", "perplexity_dataset": [f"{tmp_path}/held.jsonl"]},
        }
    )
    prepare(run.data, "sft", write_hf_dir(tmp_path / "hf", "chatml"), tmp_path / "data")
    found = overlap(run, tmp_path / "data")
    # Another mark at the end is another question, and a row for validation is none that is trained.
    assert (found["evaluation_prompts"], found["overlap_with_evaluation"]) == (5, 2)
    assert found["examples"] == ["who are you, tiny?", "why?"]
