"""`mcore-flows from-swift` as people meet it: the file, the tables, the exit status; and `plan` takes what it made."""

from pathlib import Path

import pytest

from configs.schema.load import load_run
from tests.unit.flows.command_line import mcore_flows
from tests.unit.flows.from_swift.commands import DENSE_SFT, MOE_LORA, PT_PACKING, write_workspace
from tests.unit.tasks.model_folders import listing


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return write_workspace(tmp_path)


@pytest.mark.parametrize(
    ("text", "status"), [(DENSE_SFT, 0), (MOE_LORA, 0), (PT_PACKING, 4)], ids=["dense-sft", "moe-lora", "pt-packing"]
)
def test_a_command_becomes_a_run_file_that_plan_takes(here: Path, text: str, status: int) -> None:
    (here / "train.sh").write_text(text)
    for given in ("train.sh", text):
        done = mcore_flows("from-swift", given, "--output", "runs/run.yaml", "--overwrite", cwd=here)
        assert (done.returncode, done.stdout) == (status, "runs/run.yaml\n"), done.stderr
        assert done.stderr.startswith("Carried over:")
        assert ("need your hand" in done.stderr) == (status == 4)
    load_run(here / "runs/run.yaml")
    planned = mcore_flows("plan", "runs/run.yaml", cwd=here)
    assert planned.returncode == 0, planned.stderr
    assert "7 of 7 stages run, 0 are reused." in planned.stdout


def test_standard_output_is_the_file_alone(here: Path) -> None:
    done = mcore_flows("from-swift", MOE_LORA, "--name", "mine", cwd=here)
    (here / "run.yaml").write_text(done.stdout)
    assert done.returncode == 0 and load_run(here / "run.yaml").name == "mine"
    (here / "sft.yaml").write_text("model: model\ndataset: [rows.jsonl]\ntrain_iters: 3\n")
    done = mcore_flows("from-swift", "sft.yaml", "--method", "sft", cwd=here)
    assert done.returncode == 0 and "train_iters: 3" in done.stdout


def test_the_tables_say_what_was_left_out_and_what_it_changes(here: Path) -> None:
    command = "megatron sft --model model --dataset org/set#9 --train_iters 2 --optimizer sgd --num_worker 2"
    done = mcore_flows("from-swift", command, cwd=here)
    lines = {line.split()[0]: " ".join(line.split()) for line in done.stderr.splitlines() if line.startswith("  ")}
    assert done.returncode == 4
    assert lines["optimizer"] == "optimizer sgd what is learnt AdamW"
    assert lines["num_worker"].endswith("did you mean --num_workers?")
    assert "org/set#9 data.dataset: org/set#9 from ModelScope when the run needs it" in lines["dataset"]
    assert "2 of the above change what is learnt and need your hand." in done.stderr


def test_nothing_is_overwritten_or_written_by_a_refusal(here: Path) -> None:
    (here / "run.yaml").write_text("mine\n")
    before = listing(here)
    for words, message in (
        ([PT_PACKING, "--output", "run.yaml"], "run.yaml: expected no such file"),
        (["megatron sft --model model", "--output", "new.yaml"], "--dataset: expected at least one file"),
        (["swift export --model model --to_mcore true", "--output", "new.yaml"], "mcore-flows convert"),
        (["missing.yaml", "--method", "pt"], "No such file"),
        ([PT_PACKING, "--output", ".", "--overwrite"], "expected no such file, found a folder"),
        ([PT_PACKING, "--output", "run.yaml/new.yaml"], "run.yaml, above run.yaml/new.yaml: expected a folder"),
    ):
        done = mcore_flows("from-swift", *words, cwd=here)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert message in done.stderr and "Traceback" not in done.stderr
    assert listing(here) == before
