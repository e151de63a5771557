"""How long a run is, and the learning rate of each of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.schema.train import TrainConfig
from mcore.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from mcore.data.dataset import TokenDataset


@dataclass(frozen=True, slots=True)
class Schedule:
    """Length and learning rate of a run, in steps (megatron says iterations)."""

    train_iters: int
    lr_warmup_iters: int

    @classmethod
    def from_config(cls, config: TrainConfig, data: TokenDataset) -> Schedule:
        """Resolve epochs and fractions.

        Args:
            config: The run's `train` group.
            data: The training samples that epochs are counted in.

        Raises:
            ConfigError: Warm-up and decay do not fit into it.
        """
        train_iters = config.train_iters or data.iterations(config.num_train_epochs or 1.0, config.global_batch_size)
        if problems := config.length_problems(train_iters):
            raise ConfigError(
                f"the learning rate does not fit into the run's {train_iters} steps",
                [Problem(f"train.{field}", found=what) for field, what in problems],
            )
        return cls(train_iters, config.warmup_iters(train_iters))


def lr_scheduler(config: TrainConfig, schedule: Schedule, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """megatron-core's scheduler, counting in steps; it writes rate and weight decay into the optimizer's groups.

    Step k, counted from 1, is made with the rate at k - 1: the first step of a warm-up has rate 0, as in megatron and
    transformers.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=schedule.lr_warmup_iters,
        lr_decay_steps=config.decay_iters(schedule.train_iters),
        lr_decay_style=config.lr_decay_style,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
        wsd_decay_steps=config.lr_wsd_decay_iters,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=schedule.train_iters,
        wd_incr_style="constant",
        # A checkpoint of another schedule is refused rather than followed.
        use_checkpoint_opt_param_scheduler=False,
    )
