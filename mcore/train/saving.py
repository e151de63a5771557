"""When a run's checkpoints are written and finished, and what follows behind a finished one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.backend.parallel import on_rank_0
from mcore.bridge.hf_config import HF_FOLDER
from mcore.bridge.live_export import save_safetensors
from mcore.errors import Problem, TrainingError
from mcore.progress import say
from mcore.select import iteration_dir
from mcore.train import checkpoint
from mcore.train.checkpoint import Saving
from mcore.train.housekeeping import go_back, pending_dir, prune, publish, safetensors_dir
from mcore.train.model import Training
from mcore.train.output import checkpoint_bytes
from mcore.train.position import Position
from mcore.train.schedule import Schedule

SLOW_DISK_BYTES_PER_S = 200e6


@dataclass(kw_only=True)
class Saver:
    """Saves a run on this rank, while training goes on if the run asks for that.

    Attributes:
        config: The run's `train` group.
        schedule: Its resolved length.
        layout: How the model is divided.
        output: The run's folder.
        training: What is saved.
        hf_config: Mapping of the base model's `config.json`.
        longest_s: Seconds that a save took at most, whether training waited or not; before the first, what it takes
            on a slow disk.
    """

    config: TrainConfig
    schedule: Schedule
    layout: Layout
    output: Path
    training: Training
    hf_config: Mapping[str, Any]
    longest_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.longest_s = checkpoint_bytes(self.config, self.hf_config) / SLOW_DISK_BYTES_PER_S
        self._saving: Saving | None = None
        self._waited_s = 0.0

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._saving is not None and not self._saving.is_written

    def save(self, position: Position, *, in_background: bool) -> None:
        """Save; all ranks call it. One that is still being written is finished first.

        Args:
            position: Where the run stands.
            in_background: Whether to return as soon as training may go on.
        """
        self.finish()
        start_s = time.perf_counter()
        settings = {**self.hf_config, **self.config.model_dump()}
        self._saving = checkpoint.begin(
            self.output, self.training, position, self.layout, settings, in_background=in_background
        )
        if self.config.save_safetensors:
            self.write_safetensors(pending_dir(self.output, position.iteration))
        self._waited_s = time.perf_counter() - start_s
        if not in_background:
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written, and remove the checkpoints that it makes superfluous; all ranks call it."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        start_s = time.perf_counter()
        saving.finish()
        if dist.get_rank() == 0:
            iteration = saving.position.iteration
            publish(self.output, iteration)
            removed = prune(
                self.output,
                save_steps=self.config.save_steps,
                train_iters=self.schedule.train_iters,
                save_total_limit=self.config.save_total_limit,
            )
            waited_s = self._waited_s + time.perf_counter() - start_s
            self.longest_s = max(self.longest_s, waited_s, saving.seconds)
            meanwhile = f", of which training waited {waited_s:.1f} s" if saving.seconds > waited_s else ""
            also = f", removed {', '.join(map(str, removed))}" if removed else ""
            say(f"iteration {iteration}: saved in {max(waited_s, saving.seconds):.1f} s{meanwhile}{also}")
        dist.barrier()

    def write_safetensors(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder; all ranks call it."""
        save_safetensors(
            self.training.modules,
            self.hf_config,
            folder,
            small_files=self.output / HF_FOLDER,
            overwrite=True,
        )

    def make_up(self, iteration: int) -> None:
        """Write the Hugging Face folder of the checkpoint that was loaded, if the run was killed before it could."""
        if self.config.save_safetensors and not safetensors_dir(self.output, iteration).exists():
            self.write_safetensors(safetensors_dir(self.output, iteration))

    def load_last_on_schedule(self, why: str) -> Position:
        """Put back the last checkpoint that an undisturbed run has, and remove those behind it; all ranks call it.

        Args:
            why: What to say if there is none.

        Raises:
            TrainingError: There is none.
        """
        self.finish()
        iteration = on_rank_0(
            lambda: go_back(self.output, save_steps=self.config.save_steps, train_iters=self.schedule.train_iters)
        )
        if iteration is None:
            fix = f"Change the data or the rate, or save earlier: train.save_steps is {self.config.save_steps}."
            raise TrainingError(why, [Problem(str(self.output), "a checkpoint to go back to", "none yet", fix)])
        return checkpoint.load(iteration_dir(self.output, iteration), self.training, self.layout)
