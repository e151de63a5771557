"""The training loop: step, record, validate, save, and leave if asked to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func

from configs.schema.train import TrainConfig
from mcore.backend.balancing import set_trained_share, take_expert_tokens
from mcore.backend.layout import Layout
from mcore.bridge.families import dims_of
from mcore.bridge.hf_config import HF_FOLDER
from mcore.bridge.live_export import save_safetensors
from mcore.data.dataset import TokenDataset
from mcore.data.template import Sample
from mcore.errors import Problem, StoppedError, TrainingError
from mcore.progress import Advance, progress, say
from mcore.train import checkpoint
from mcore.train.batches import Batching, MicroBatch
from mcore.train.checkpoint import Position
from mcore.train.housekeeping import prune, safetensors_dir
from mcore.train.metrics import Step, TrainingLog, model_flops
from mcore.train.model import Training
from mcore.train.schedule import Schedule
from mcore.train.stop import StopRequest
from mcore.train.tuners.dropout import seed_step


@dataclass(kw_only=True)
class Loop:
    """One run's steps on this rank.

    Attributes:
        config: The run's `train` group.
        schedule: Its resolved length and warm-up.
        layout: How the model is divided.
        output: The run's folder.
        training: Model, optimizer and scheduler.
        forward_step: The method's: micro-batches and model to output and loss.
        data: Training samples.
        validation: Validation samples, maybe none.
        device: Where inputs go.
        stop: Whether this process was asked to stop.
        hf_config: Mapping of the base model's `config.json`.
        packing_length: Tokens of a row that samples are packed into; None to pad them instead.
    """

    config: TrainConfig
    schedule: Schedule
    layout: Layout
    output: Path
    training: Training
    forward_step: Callable[..., Any]
    data: TokenDataset
    validation: TokenDataset
    device: torch.device
    stop: StopRequest
    hf_config: Mapping[str, Any]
    packing_length: int | None = None

    def __post_init__(self) -> None:
        self.dims = dims_of(self.hf_config)
        self.log: TrainingLog | None = None  # rank 0's
        self.forward_backward = get_forward_backward_func()
        self.batching = Batching(
            micro_batch_size=self.config.micro_batch_size,
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            same_length=self.layout.pipeline_model_parallel_size > 1,
            length_multiple=self.layout.tensor_model_parallel_size if self.layout.sequence_parallel else 1,
            count_multiple=self.config.interleaved_stages,
            packing_length=self.packing_length,
            cost=self._cost,
        )

    def run(self, position: Position) -> None:
        """Train from `position` to the end.

        Raises:
            StoppedError: SIGTERM came; the step was finished and saved.
            TrainingError: A loss or a gradient is not finite.
        """
        first, last = position.iteration, self.schedule.train_iters
        bar: AbstractContextManager[Advance] = nullcontext(lambda count=1, note="": None)
        if dist.get_rank() == 0:
            bar = progress("train", last, "steps", done=first)
            self.log = TrainingLog(
                self.output,
                iteration=first if first else -1,
                consumed_tokens=position.consumed_tokens,
                global_batch_size=self.config.global_batch_size,
                logging_steps=self.config.logging_steps,
                world_size=dist.get_world_size(),
            )
            if self.packing_length is not None and first < last:
                samples = self.data.batch(first * self.config.global_batch_size, self.config.global_batch_size)
                say(f"train: packing: iteration {first + 1} takes {self.batching.describe(samples)}")
        try:
            if first == 0:
                self.validate(0)
            elif self.config.save_safetensors and not safetensors_dir(self.output, first).exists():
                self.write_safetensors(first)  # the run was killed before it could
            with bar as advance:
                self._steps(position, advance)
            if self.log:
                self.log.summarise()
        finally:
            if self.log:
                self.log.close()

    def _steps(self, position: Position, advance: Advance) -> None:
        last = self.schedule.train_iters
        eval_steps = self.config.eval_steps or self.config.save_steps
        for iteration in range(position.iteration + 1, last + 1):
            step, stopping = self.step(iteration)
            position = Position(
                iteration, iteration * self.config.global_batch_size, position.consumed_tokens + step.tokens
            )
            note = self.log.step(step, last=iteration == last) if self.log else ""
            advance(1, note)
            if iteration % eval_steps == 0 or iteration == last:
                self.validate(iteration)
            if iteration % self.config.save_steps == 0 or iteration == last or stopping:
                self.save(position)
            if stopping and iteration < last:
                raise StoppedError(
                    f"asked to stop: iteration {iteration} of {last} is saved",
                    [Problem(str(self.output), fix="Run the same command again to go on.")],
                )

    def step(self, iteration: int) -> tuple[Step, bool]:
        """Make one step. Returns it, and whether any rank was asked to stop.

        Raises:
            TrainingError: Its loss or gradient is not finite; names the samples.
        """
        start_s = time.perf_counter()
        optimizer, modules = self.training.optimizer, self.training.modules
        size = self.config.global_batch_size
        samples = self.data.batch((iteration - 1) * size, size)
        if self.config.lora_dropout and self.training.adapters is not None:
            seed_step(self.config.seed, iteration)
        lengths = [len(sample.token_ids) for sample in samples]
        num_trained = sum(int(sum(sample.loss_mask)) for sample in samples)
        set_trained_share(modules, num_trained / max(1, sum(lengths) - len(lengths)))
        for chunk in self.training.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss_sum = self._forward(samples, train=True)
        lr = get_canonical_lr_for_logging(optimizer.param_groups)
        _, grad_norm, _ = optimizer.step()
        self.training.scheduler.step(1)
        loss_sum, num_stopping = self._sum_over_ranks(loss_sum, float(self.stop.received))
        loss = loss_sum / num_trained
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"iteration {iteration}: loss {loss}, gradient norm {grad_norm}",
                [
                    Problem(f"sample {self.data.sample_index((iteration - 1) * size + place)} ({sample.place})")
                    for place, sample in enumerate(samples)
                ],
            )
        tokens_LE = []
        if any(self.dims.moe_layers):
            all_LE = take_expert_tokens(modules, self.dims.num_layers, self.dims.size("experts"))
            tokens_LE = [of_layer for of_layer, is_moe in zip(all_LE, self.dims.moe_layers, strict=True) if is_moe]
        step = Step(
            iteration=iteration,
            loss=loss,
            grad_norm=float(grad_norm),
            lr=lr,
            step_time_s=time.perf_counter() - start_s,
            tokens=sum(lengths),
            flops=model_flops(self.dims, lengths, num_trained, is_frozen=self.training.adapters is not None),
            expert_tokens=tokens_LE,
        )
        return step, num_stopping > 0

    def validate(self, iteration: int) -> None:
        """Record the mean loss over all trained tokens of the validation rows, if there are any.

        Raises:
            TrainingError: It is not finite.
        """
        if not len(self.validation):
            return
        start_s = time.perf_counter()
        by_length = sorted(self.validation, key=lambda sample: len(sample.token_ids))
        for chunk in self.training.chunks:
            chunk.eval()
        loss_sum = 0.0
        with torch.no_grad():
            for start in range(0, len(by_length), self.config.global_batch_size):
                loss_sum += self._forward(by_length[start : start + self.config.global_batch_size], train=False)
        for chunk in self.training.chunks:
            chunk.train()
        (loss_sum,) = self._sum_over_ranks(loss_sum)
        loss = loss_sum / self.validation.num_trained_tokens
        if not math.isfinite(loss):
            raise TrainingError(f"iteration {iteration}: validation loss {loss}")
        if self.log:
            self.log.validation(iteration, loss)
            say(
                f"iteration {iteration}: validation loss {loss:.4f} "
                f"({len(self.validation)} samples, {time.perf_counter() - start_s:.1f} s)"
            )

    def save(self, position: Position) -> None:
        """Save, and remove the checkpoints that the new one makes superfluous."""
        start_s = time.perf_counter()
        if self.log:
            self.log.sync()
        settings = {**self.hf_config, **self.config.model_dump()}
        checkpoint.save(self.output, self.training, position, self.layout, settings)
        if self.config.save_safetensors:
            self.write_safetensors(position.iteration)
        if self.log:
            removed = prune(
                self.output,
                save_steps=self.config.save_steps,
                train_iters=self.schedule.train_iters,
                save_total_limit=self.config.save_total_limit,
            )
            also = f", removed {', '.join(map(str, removed))}" if removed else ""
            say(f"iteration {position.iteration}: saved in {time.perf_counter() - start_s:.1f} s{also}")
        dist.barrier()

    def write_safetensors(self, iteration: int) -> None:
        """Write the weights as a Hugging Face folder beside the checkpoint of this iteration."""
        save_safetensors(
            self.training.modules,
            self.hf_config,
            safetensors_dir(self.output, iteration),
            small_files=self.output / HF_FOLDER,
            overwrite=True,
        )

    def _forward(self, samples: Sequence[Sample], *, train: bool) -> float:
        """Forward (and backward) of this rank's share of the samples.

        Returns:
            The sum of its trained tokens' losses; 0 on ranks that don't hold the last pipeline stage.
        """
        batches: list[MicroBatch] = self.batching.micro_batches(samples, self.device)
        chunks = list(self.training.chunks)
        iterators = [iter(batches) for _ in chunks]  # every part of the model reads all of them
        losses = self.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens_BS.shape[1],
            micro_batch_size=self.config.micro_batch_size,
            forward_only=not train,
        )
        return float(sum(record["loss_sum"].double() for record in losses))

    def _cost(self, sample: Sample) -> float:
        return model_flops(self.dims, [len(sample.token_ids)], int(sum(sample.loss_mask)))

    def _sum_over_ranks(self, loss_sum: float, *others: float) -> list[float]:
        """Sums over all ranks; the loss only counts once for each tensor parallel group."""
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            loss_sum = 0.0
        sums = torch.tensor([loss_sum, *others], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        values: list[float] = sums.tolist()
        return values
