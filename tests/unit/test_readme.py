"""The README's claims: its commands exist with the options it names, its files are there, its run is one."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from configs.schema.run import RunConfig
from flows.cli import app
from mcore.backend.layout import Layout
from tasks.graph import STAGES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?:\.venv/bin/)?(mcore-flows [a-z][^`#\n]*)", README)))


def test_there_are_commands() -> None:
    assert {command.split()[1] for command in COMMANDS} >= {
        "run", "plan", "fetch", "convert", "export", "verify", "train", "evaluate", "artifacts", "report",
    }  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_exists_with_its_options(line: str) -> None:
    words = shlex.split(line)[1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands
        command = command.commands[name]
    given = {word for word in words if word.startswith("--")}
    options = [parameter for parameter in command.params if parameter.opts[0].startswith("--")]
    assert given <= {name for option in options for name in option.opts}
    if words:  # more than the command's name in a sentence
        assert {option.opts[0] for option in options if option.required} <= given


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README)) - {"sure"}
    assert {"setup", "demo"} <= named <= targets


def test_files_exist() -> None:
    linked = set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    named = set(re.findall(r"`((?:docs|flows|tasks|mcore|configs|requirements)/[\w./]+)`", README))
    assert named and linked
    assert not [name for name in linked | named if not (ROOT / name).exists()]


def test_the_five_lines_are_a_run() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    run = RunConfig.model_validate(yaml.safe_load(text))
    assert len([line for line in text.splitlines() if line.strip()]) == 5 and run.model.source.startswith("hf:")


def test_its_layout_fits_the_only_model_that_needs_no_hub() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    train = RunConfig.model_validate(yaml.safe_load(text)).train
    smollm2 = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip

    def problems(**sizes: int) -> list[object]:
        return list(Layout(**sizes).problems(smollm2, padded_vocab_size=49152))

    tp, pp = train.tensor_model_parallel_size, train.pipeline_model_parallel_size
    assert problems(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp) == []
    assert problems(tensor_model_parallel_size=3) == [] and problems(tensor_model_parallel_size=2) != []


def test_a_run_has_epochs_or_steps() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (options,) = re.findall(r"`(--set train.num_train_epochs=null [^`]*)`", README)
    folder_run = yaml.safe_load(text)
    for name, value in (option.split("=") for option in options.split() if option != "--set"):
        folder_run["train"][name.removeprefix("train.")] = yaml.safe_load(value)
    assert RunConfig.model_validate(folder_run).train.train_iters == 100


def test_every_stage_is_in_the_table() -> None:
    rows = set(re.findall(r"^\| ([a-z]+) \|", README, re.MULTILINE))
    assert {stage.kind for stage in STAGES} <= rows
