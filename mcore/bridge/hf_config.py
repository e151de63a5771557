"""A Hugging Face folder's small files: its config, and what travels along with the weights. No torch here."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from mcore.bridge.config_kinds import kind_problems
from mcore.errors import Problem, SourceError

CONFIG_FILE = "config.json"
HF_FOLDER = "hf"
"""Folder of a checkpoint with the base model's small files: what export needs beside the weights."""
TRAVEL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Files that make a folder of weights a usable model: config, generation config, tokenizer, chat template. No code."""
TRAVEL_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
"""Beginnings of further files' names: the terms that a derived model is under."""
LENGTH_AFTER_SCALING = ("llama3", "yarn", "longrope", "su")
"""Rope types whose `max_position_embeddings` has the factor in it already."""
STAY_BEHIND = ("metrics.json", "manifest.json", "report.json")
"""What our own stages write beside a model."""


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The mapping of the folder's `config.json`.

    Raises:
        SourceError: The file is missing, holds no JSON object, or has values of a wrong kind; names all of these.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(), parse_constant=_no_number, parse_float=_finite)
        if not isinstance(config, dict):
            raise ValueError(f"a JSON object is needed, not {type(config).__name__}")
    except OSError as exc:
        raise SourceError(
            "the folder is no Hugging Face model", [Problem(str(path), found=exc.strerror or str(exc))]
        ) from exc
    except (ValueError, RecursionError) as exc:  # JSON and UTF-8 errors are ValueErrors
        raise SourceError("the model's config can't be read", [Problem(str(path), "JSON", str(exc))]) from exc
    if problems := kind_problems(config):
        raise SourceError("the model's config is not valid", problems)
    return config


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number that JSON has")


def _finite(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _no_number(text)


def max_served_tokens(config: Mapping[str, Any]) -> int | None:
    """Longest prompt and answer together that vLLM takes from a model by its config; None if the config has no limit.

    A factor in the rope settings lengthens it, but for the rope types whose configs name the length after scaling.

    Source: vLLM 0.32, `vllm/config/model.py`, `_get_and_verify_max_len`.
    """
    limit = config.get("max_position_embeddings")
    if not isinstance(limit, int) or limit < 1:
        return None  # whether the field may be missing or zero is for the family to say
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, Mapping) else {}
    factor = rope.get("factor")
    if (rope.get("rope_type") or rope.get("type")) in LENGTH_AFTER_SCALING or not isinstance(factor, int | float):
        return limit
    return int(limit * factor)


def exported_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config of a model whose weights were written again, in `dtype` (torch's name) and not quantised."""
    exported = {key: value for key, value in config.items() if key != "quantization_config"}
    for key in {"dtype", "torch_dtype"} & exported.keys() or {"dtype"}:
        exported[key] = dtype
    return exported


def copy_small_files(source: Path, target: Path) -> list[str]:
    """Copy config, tokenizer, chat templates and licences, but no weights, no code and no pickles.

    Returns:
        The files' names.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = []
    for path in sorted(source.iterdir()):
        travels = path.name.endswith(TRAVEL_SUFFIXES) or path.name.startswith(TRAVEL_NAMES)
        if path.is_file() and travels and path.name not in STAY_BEHIND and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
            names.append(path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        for path in sorted(templates.glob("*.jinja")):
            (target / templates.name).mkdir(exist_ok=True)
            shutil.copyfile(path, target / templates.name / path.name)
            names.append(f"{templates.name}/{path.name}")
    return names
