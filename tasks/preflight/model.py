"""What a model says to what the run wants to do with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.schema.convert import ConvertConfig
from configs.schema.model import ModelConfig
from configs.schema.train import TrainConfig
from mcore.artifacts import Store
from mcore.bridge.hf_config import read_hf_config
from mcore.errors import ConfigError, Problem
from mcore.sources.resolve import ResolvedSource, resolve
from mcore.train.expert_options import balancing_problems
from mcore.train.fp8_options import fp8_problems
from mcore.train.packing_options import packing_problems
from mcore.train.recompute_options import recompute_problems
from mcore.train.tuners.readers import adapter_file_problems
from mcore.train.tuners.targets import choose_targets
from mcore.train.tuners.whole import choose_whole
from tasks.graph import StagePlan
from tasks.model_folder import collected, model_config_problems, model_folder_problems, served_problems
from tasks.preflight.groups import Groups


def source_of(model: ModelConfig, groups: Groups, problems: list[Problem]) -> ResolvedSource | None:
    """Where the model comes from; None if that can't be told, and then the problems are added."""
    found: list[Problem] = []
    source = collected(found, lambda: resolve(model.source))
    folder = Path(model.source).expanduser()
    if source is None and folder.is_dir():  # not only that its config.json is wrong
        found = model_folder_problems(folder, needs_chat=groups.method == "sft")
    problems += found
    return source


def fetched(plans: Iterable[StagePlan], store: Store) -> Path | None:
    """Folder of a remote model that the store has already."""
    for plan in plans:
        if plan.name == "fetch" and (artifact := store.find(plan.kind, plan.key)):
            return Path(artifact.path)
    return None


def model_problems(source: ResolvedSource, fetched: Path | None, groups: Groups, *, ask_source: bool) -> list[Problem]:
    """Findings about a model and what the run wants to do with it; by its config alone if it is not there yet."""
    problems: list[Problem] = []
    divisor, layout = (groups.convert or ConvertConfig()).make_vocab_size_divisible_by, groups.layout
    folder = source.path or fetched
    if folder is not None:
        needs_chat = groups.method == "sft"
        problems += model_folder_problems(
            folder, make_vocab_size_divisible_by=divisor, layout=layout, needs_chat=needs_chat
        )
        config = collected([], lambda: read_hf_config(folder))
    else:
        config = collected(problems, source.hf_config)
        if config is not None:
            problems += model_config_problems(config, make_vocab_size_divisible_by=divisor, layout=layout)
            if ask_source:
                collected(problems, source.check_reachable)
    train = groups.train
    if config is not None and train is not None:
        found = collected([], lambda: balancing_problems(train, config))  # what it can't read was said before
        problems += found or []
        problems += collected([], lambda: recompute_problems(train, config)) or []
        # Which layers are built, and on what GPU, is known where the run starts.
        engine = "transformer_engine"
        problems += collected([], lambda: fp8_problems(train, config, backend=engine, capability=None)) or []
        if (data := groups.data) is not None:
            max_length = data.max_length
            problems += collected([], lambda: packing_problems(train, config, max_length)) or []
    if config is not None and train is not None and train.tuner_type == "lora":
        collected(problems, lambda: _lora_problems(train, config, groups))
    if config is not None and groups.evaluate is not None:
        problems += served_problems(config, groups.evaluate)
    return problems


def _lora_problems(train: TrainConfig, config: Mapping[str, Any], groups: Groups) -> None:
    """Check which modules have adapters or learn whole, and who has to read the adapter."""
    choose_whole(train.modules_to_save, config, choose_targets(train.target_modules, config))
    if groups.export is None or groups.export.merge_lora:
        return
    if problems := adapter_file_problems(train, config, evaluates=groups.evaluate is not None):
        raise ConfigError("the adapter can't be used by itself", problems)
