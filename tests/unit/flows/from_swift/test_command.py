"""The command in a line, a script, or a YAML file."""

from pathlib import Path

import pytest

from flows.from_swift.command import read_command
from mcore.errors import ConfigError


def test_a_line() -> None:
    command = read_command(
        "NPROC_PER_NODE=2 /opt/bin/megatron pt --dataset a.jsonl b.jsonl#5 --lr=1e-5 --packing --model-author x "
        "--seed 1 --seed 2"
    )
    assert command.method == "pt" and dict(command.environment) == {"NPROC_PER_NODE": "2"}
    assert command.arguments == {
        "dataset": ["a.jsonl", "b.jsonl#5"], "lr": "1e-5", "packing": True, "model_author": "x", "seed": "2",
    }  # fmt: skip


def test_negative_numbers_are_values() -> None:
    assert read_command("megatron sft --eval_iters -1").arguments == {"eval_iters": "-1"}


def test_a_script(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text("set -e\nexport NPROC_PER_NODE=4\nmegatron sft \\\n  --lr 1e-5 | tee log\n")
    command = read_command(str(script))
    assert command.arguments == {"lr": "1e-5"} and command.environment["NPROC_PER_NODE"] == "4"
    assert command.not_read == ("set -e", "tee log")


def test_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("model: m\nlr: 1.0e-5\ndataset: [a.jsonl, b.jsonl]\nsave-steps: 10\n")
    expected = {"model": "m", "lr": 1e-5, "dataset": ["a.jsonl", "b.jsonl"], "save_steps": 10}
    alone = read_command(str(file), "sft")
    assert alone.arguments == expected and alone.method == "sft"
    assert read_command(f"megatron pt --config {file}").arguments == expected
    assert read_command(f"megatron pt {file} --lr 2e-5").arguments == expected | {"lr": "2e-5"}
    assert read_command(f"megatron pt --lr 2e-5 --config {file}").arguments == expected | {"lr": "2e-5"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "found nothing"),
        ("train it please", "expected megatron pt … or megatron sft …"),
        ("none.sh", "name a script or YAML file that is there"),
        ("swift sft --model m", "no Megatron-SWIFT command"),
        ("megatron rlhf --model m", "only pt and sft have a run file"),
        ("swift export --model m --to_mcore true", "mcore-flows convert --model SRC --output DIR"),
        ("CUDA_VISIBLE_DEVICES=0 megatron export --mcore_model m --to_hf true", "mcore-flows export --checkpoint DIR"),
        ("megatron sft --lr 1\nmegatron sft --lr 2", "expected one command, found 2"),
        ("megatron sft oops --lr 1", "oops: expected an argument's name"),
        ("megatron sft NPROC_PER_NODE=2", "Variables go in front of the command"),
        ("megatron sft --lr 1 \\ \n  --model m", "a line that begins with --model"),
        ("megatron sft --model $MODEL", "$MODEL: has no value"),
        ("megatron sft --config none.yaml", "none.yaml: found No such file"),
    ],
)
def test_what_is_no_command_to_translate(
    given: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        read_command(given)
    assert message in str(error.value)


def test_a_yaml_file_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    for text, message in (("[1, 2]", "expected a mapping, found list"), ("a: [", "expected YAML")):
        file.write_text(text)
        with pytest.raises(ConfigError) as error:
            read_command(str(file), "sft")
        assert message in str(error.value)
    with pytest.raises(ConfigError) as error:
        read_command(str(file))
    assert "Add --method sft or --method pt" in str(error.value)
