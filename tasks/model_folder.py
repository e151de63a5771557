"""Everything that can be wrong with a model folder for a run, found without torch and without reading weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from configs.schema.evaluate import EvaluateConfig
from mcore.backend.layout import Layout
from mcore.bridge.families import config_findings, dims_of, family_of_config
from mcore.bridge.families.classifier import SUFFIX as CLASSIFIER_SUFFIX
from mcore.bridge.further_tokens import config_of_files
from mcore.bridge.hf_config import max_served_tokens, read_hf_config
from mcore.bridge.hf_headers import read_headers
from mcore.bridge.hf_quantised import quantisation_of
from mcore.bridge.plan import mcore_shapes_of, plan_convert
from mcore.errors import InputError, Problem

T = TypeVar("T")

TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
"""Each of these sets of files makes a tokenizer."""

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_folder_problems(
    folder: Path, *, make_vocab_size_divisible_by: int = 128, layout: Layout | None = None, needs_chat: bool = False
) -> list[Problem]:
    """Everything that keeps a local model from being converted, divided, trained and served.

    Args:
        folder: A Hugging Face folder.
        make_vocab_size_divisible_by: Rows: the vocabulary is padded to a multiple of this.
        layout: How training divides the model; not checked if None.
        needs_chat: Whether conversations are trained, so that the tokenizer must bring a chat template.
    """
    if not folder.is_dir():
        return [Problem(str(folder), "a Hugging Face folder", "none")]
    problems: list[Problem] = []
    config = collected(problems, lambda: read_hf_config(folder))
    tensors = collected(problems, lambda: read_headers(folder))
    problems += _tokenizer_problems(folder, needs_chat=needs_chat)
    if config is None:
        return problems
    if tensors is not None:
        config = config_of_files(config, tensors)
    problems += _token_id_problems(folder, config)
    problems += model_config_problems(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by, layout=layout)
    said: list[Problem] = []
    family = collected(said, lambda: family_of_config(config))
    dims = collected(said, lambda: dims_of(config))
    if family is not None and dims is not None and tensors is not None:
        shapes = mcore_shapes_of(family, dims)
        quantisation = collected(problems, lambda: quantisation_of(config))
        collected(
            problems,
            lambda: plan_convert(family, dims, hf=tensors, mcore_shapes=shapes, quantisation=quantisation),
        )
    return problems


def model_config_problems(
    config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 128, layout: Layout | None = None
) -> list[Problem]:
    """What can be said of a model by its `config.json` alone, before it is downloaded.

    Args:
        config: The file's mapping.
        make_vocab_size_divisible_by: Rows: the vocabulary is padded to a multiple of this.
        layout: How training divides the model; not checked if None.
    """
    problems = config_findings(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by).problems
    said: list[Problem] = []  # the same again, of what is wrong with the config
    family = collected(said, lambda: family_of_config(config))
    dims = collected(said, lambda: dims_of(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by))
    if family is None or dims is None:
        return problems
    if layout is not None and family.hf_architecture.endswith(CLASSIFIER_SUFFIX):
        expected = "a ...ForCausalLM model, as train.method pt and sft train on tokens"
        problems.append(Problem("config.json: architectures", expected, repr(family.hf_architecture)))
    if layout is not None:
        problems += layout.problems(config, padded_vocab_size=dims.padded_vocab) + layout.training_problems(config)
    return problems


def served_problems(config: Mapping[str, Any], evaluate: EvaluateConfig) -> list[Problem]:
    """What keeps vLLM from serving a model, by its `config.json`, as the evaluation asks."""
    problems = []
    if any(str(name).endswith(CLASSIFIER_SUFFIX) for name in config.get("architectures") or ()):
        problems.append(Problem("evaluate", "nothing, as the model is a classifier and writes no text", "a suite"))
    longest, heads = max_served_tokens(config), config.get("num_attention_heads")
    if longest is not None and evaluate.max_model_len > longest:
        expected = f"at most {longest} (max_position_embeddings of the model, and its rope factor)"
        problems.append(Problem("evaluate.max_model_len", expected, str(evaluate.max_model_len)))
    if isinstance(heads, int) and heads % evaluate.tensor_parallel_size:
        expected = f"a divisor of the model's num_attention_heads ({heads})"
        problems.append(Problem("evaluate.tensor_parallel_size", expected, str(evaluate.tensor_parallel_size)))
    return problems


def collected(problems: list[Problem], read: Callable[[], T]) -> T | None:
    """What `read` returns; if it finds the input wrong, its problems go to the list instead."""
    try:
        return read()
    except InputError as error:
        problems += error.problems or [Problem(error.summary)]
        return None


def _tokenizer_problems(folder: Path, *, needs_chat: bool) -> list[Problem]:
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        sets = " or ".join(" and ".join(names) for names in TOKENIZERS)
        return [Problem(str(folder), f"a tokenizer ({sets})", "none")]
    if needs_chat and not _has_chat_template(folder):
        return [
            Problem(
                str(folder),
                "a chat template (chat_template.jinja, or chat_template in tokenizer_config.json)",
                "none",
                "Take the instruct model, or train on text with train.method: pt.",
            )
        ]
    return []


def _has_chat_template(folder: Path) -> bool:
    names = ("chat_template.jinja", "chat_template.json")
    config = _json_object(folder / "tokenizer_config.json")
    return any((folder / name).is_file() for name in names) or bool(config.get("chat_template"))


def _token_id_problems(folder: Path, config: Mapping[str, Any]) -> list[Problem]:
    """Token ids that the embedding has no row for."""
    num_rows = config.get("vocab_size")
    if not isinstance(num_rows, int) or isinstance(num_rows, bool):
        return []  # said where the sizes are read
    problems = []
    for name, ids in _token_ids(folder):
        beyond = [number for number in ids if number >= num_rows]
        if beyond:
            problems.append(
                Problem(
                    str(folder / name),
                    f"token ids below vocab_size {num_rows} (config.json)",
                    f"{len(beyond)} beyond it, up to {max(beyond)}",
                    "Tokenizer and weights belong to different models, or the embedding was not resized.",
                )
            )
    return problems + [
        Problem(f"{folder / file}: {key}", f"a token id below vocab_size {num_rows}", repr(number))
        for file in ("config.json", "generation_config.json")
        for key, number in _special_ids(_json_object(folder / file))
        # Some old configs say -1 where they mean that there is no such token.
        if not (isinstance(number, int) and -1 <= number < num_rows)
    ]


def _special_ids(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in SPECIAL_IDS:
        value = content.get(key)
        for number in value if isinstance(value, list) else [value]:
            if number is not None:
                yield key, number


def _token_ids(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Ids that each of the tokenizer's JSON files speaks of."""
    tokenizer = _json_object(folder / "tokenizer.json")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(range(len(vocabulary))) if isinstance(vocabulary, list) else _integers(vocabulary)
    added = tokenizer.get("added_tokens")
    ids += [token["id"] for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    yield "tokenizer.json", [number for number in ids if isinstance(number, int)]
    decoder = _json_object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    yield "tokenizer_config.json", [int(key) for key in decoder if key.isdecimal()] if isinstance(decoder, dict) else []
    yield "vocab.json", _integers(_json_object(folder / "vocab.json"))
    yield "added_tokens.json", _integers(_json_object(folder / "added_tokens.json"))


def _integers(vocabulary: Any) -> list[int]:
    return [number for number in vocabulary.values() if isinstance(number, int)] if isinstance(vocabulary, dict) else []


def _json_object(path: Path) -> dict[str, Any]:
    """The file's mapping; empty if it is missing or no mapping."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
