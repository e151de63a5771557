"""A training run on this rank, set up: what must be known before the first step, and where that step is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from configs.schema.run import RunConfig
from configs.schema.train import TrainConfig
from mcore.backend import parallel
from mcore.backend.layout import Layout
from mcore.backend.specs import engine_lacks, resolve_backend
from mcore.bridge.adapters import CONFIG as ADAPTER_CONFIG
from mcore.bridge.families import family_of_config
from mcore.data.dataset import TokenDataset
from mcore.errors import ConfigError, InputError, Problem
from mcore.folders import write_durably
from mcore.progress import say
from mcore.select import Selection, iterations_in, select_checkpoint
from mcore.train import checkpoint
from mcore.train.base import Base, open_base
from mcore.train.expert_options import balancing_problems
from mcore.train.fingerprint import claim, fingerprint, renew
from mcore.train.fp8_options import fp8_problems
from mcore.train.housekeeping import remove_unfinished
from mcore.train.loop import Loop
from mcore.train.metrics import SUMMARY, record_changes
from mcore.train.model import build_training, engine_problems
from mcore.train.output import checkpoint_bytes, output_problems
from mcore.train.packing_options import packing_problems
from mcore.train.position import Position
from mcore.train.prepared import prepared
from mcore.train.recompute_options import recompute_problems
from mcore.train.schedule import Schedule
from mcore.train.stop import StopRequest
from mcore.train.tuners.options import LoraOptions, adapter_problems


def train(
    run: RunConfig, base: Path, output: Path, stop: StopRequest | None = None, *, data: Path | None = None
) -> None:
    """Train until the last step, going on from `output`'s newest complete checkpoint if there is one.

    Every process of the run calls this. It returns when the run is complete, at once if it was already, and leaves the
    process groups up (`mcore.backend.parallel.stop` ends them).

    Args:
        run: The whole run; its `data` and `train` decide what is learnt.
        base: Checkpoint folder to start from, with `release/` and `hf/` as `mcore.bridge convert` makes it; with
            `train.load_safetensors` a Hugging Face folder.
        output: The run's folder.
        stop: Says whether the run shall save and leave; None if nobody will ask for that.
        data: Folder that `mcore.data.prepare` made of the run's data; None to make `OUTPUT-data` first.

    Raises:
        ConfigError: The run can't be started like this, or `output` belongs to another run.
        SourceError: `base` has no config of a model.
        WeightPlanError: The weights of a Hugging Face folder are not those of its config.
        DataError: The data can't be used.
        CheckpointError: The base or the run's own checkpoint can't be used.
        StoppedError: The run was asked to stop; it saved and can be resumed.
        TrainingError: A loss or a gradient is not finite.
    """
    config = run.train
    layout = Layout.of(config)
    start = open_base(base, run)
    parallel.start(layout, seed=config.seed)
    method = import_module(f"mcore.train.methods.{config.method}")
    read = partial(prepared, run, start.hf, data, output)
    samples, validation, schedule = _checked(run, layout, start, output, read)
    mark = fingerprint(
        config,
        schedule,
        data=samples.fingerprint,
        validation=validation.fingerprint,
        base_weights=start.weights,
        num_processes=dist.get_world_size(),
    )
    _agree(mark)
    resumed = parallel.on_rank_0(lambda: _prepare(output, mark, start, config))
    if resumed is not None and resumed.iteration == schedule.train_iters and (output / SUMMARY).exists():
        _say(f"{output} is complete at iteration {schedule.train_iters}")
        return
    training = build_training(config, schedule, start, layout, has_weights=resumed is None)
    for module in training.modules:
        method.prepare(module, config)
    position = Position()
    if resumed is not None:
        position = checkpoint.load(resumed.path, training, layout)
        _say(f"resuming behind iteration {position.iteration}: {resumed.reason}")
    _say(f"train: {samples.describe()}; {schedule.train_iters} steps of {config.global_batch_size} samples")
    loop = Loop(
        config=config,
        schedule=schedule,
        layout=layout,
        output=output,
        training=training,
        forward_step=method.forward_step,
        data=samples,
        validation=validation,
        device=parallel.device(),
        stop=stop or StopRequest(),
        hf_config=start.hf_config,
        packing_length=run.packing_length,
    )
    loop.run(position)


def _checked(
    run: RunConfig, layout: Layout, base: Base, output: Path, read: Callable[[], tuple[TokenDataset, TokenDataset]]
) -> tuple[TokenDataset, TokenDataset, Schedule]:
    """The data that `read` returns and the length of the run, if all of it fits.

    Raises:
        InputError: Everything that does not.
    """
    config = run.train
    problems = _problems(run, layout, base)
    errors: list[InputError] = []
    schedule: Schedule | None = None
    try:
        data, validation = read()
        if len(data) < config.global_batch_size:
            expected = f"at least train.global_batch_size samples ({config.global_batch_size})"
            fix = "Take more rows (path#N repeats them), or a smaller batch."
            problems.append(Problem("data.dataset", expected, f"{len(data)} samples", fix))
        schedule = Schedule.from_config(config, data)
    except InputError as error:
        errors.append(error)
    num_bytes = checkpoint_bytes(
        config, base.hf_config, make_vocab_size_divisible_by=run.convert.make_vocab_size_divisible_by
    )
    train_iters = schedule.train_iters if schedule is not None else config.train_iters
    problems += output_problems(output, config, base.hf_config, train_iters=train_iters, num_bytes=num_bytes)
    if errors and not problems:
        raise errors[0]
    problems += [problem for error in errors for problem in error.problems]
    if problems or schedule is None:
        raise ConfigError("the run does not fit the model, the processes, the data and its folder", problems)
    return data, validation, schedule


def _problems(run: RunConfig, layout: Layout, base: Base) -> list[Problem]:
    config = run.train
    problems = layout.problems(base.hf_config, padded_vocab_size=base.padded_vocab_size)
    problems += layout.training_problems(base.hf_config)
    problems += balancing_problems(config, base.hf_config)
    problems += recompute_problems(config, base.hf_config)
    problems += packing_problems(config, base.hf_config, run.data.max_length)
    features = family_of_config(base.hf_config).features(base.hf_config)
    backend = resolve_backend(config.backend, features)
    if config.backend == "auto" and backend != resolve_backend("auto"):
        _say(f"train: backend torch, as Transformer Engine's layers have no {', '.join(engine_lacks(features))}")
    problems += engine_problems(config, backend)
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    problems += fp8_problems(config, base.hf_config, backend=backend, capability=capability)
    problems += adapter_problems(config, base.hf_config)
    samples = config.micro_batch_size * parallel_state.get_data_parallel_world_size() * config.interleaved_stages
    if config.global_batch_size % samples:
        problems.append(
            Problem(
                "train.global_batch_size",
                "a multiple of micro_batch_size x data parallel size"
                + f"{' x pipeline_model_parallel_size' * (config.interleaved_stages > 1)} ({samples})",
                str(config.global_batch_size),
            )
        )
    return problems


def _agree(mark: dict[str, Any]) -> None:
    """Check that all processes read the same files; on several machines, each reads its own.

    Raises:
        ConfigError: They don't.
    """
    marks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(marks, mark)
    if others := [rank for rank, other in enumerate(marks) if other != marks[0]]:
        raise ConfigError(
            "the processes do not read the same run",
            [
                Problem(
                    f"rank {rank}",
                    "the data, base and settings of rank 0",
                    "others",
                    "Put run file, data and base on a file system that all machines share.",
                )
                for rank in others
            ],
        )


def _prepare(output: Path, mark: dict[str, Any], base: Base, config: TrainConfig) -> Selection | None:
    """Make the output folder ready; the checkpoint to go on from, or None to start."""
    changes = claim(output, mark, accept_changed_data=config.accept_changed_data)
    if config.tuner_type == "lora" and not (output / ADAPTER_CONFIG).exists():
        write_durably(output / ADAPTER_CONFIG, LoraOptions.of(config).peft_config(base.hf_config))
    for iteration in remove_unfinished(output):
        say(f"removed the half-written checkpoint of iteration {iteration}")
    checkpoint.copy_hf_files(base.hf, base.hf_config, output)
    selected = select_checkpoint(output) if iterations_in(output) else None
    if changes:
        if selected is not None:
            say(f"accepted: {', '.join(changes)} changed behind iteration {selected.iteration}")
            record_changes(output, selected.iteration, changes)
        renew(output, mark)
    return selected


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        say(text)
