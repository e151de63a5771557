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
from torch import Tensor

from configs.schema.train import TrainConfig
from mcore.backend.balancing import set_trained_share, take_expert_tokens
from mcore.backend.layout import Layout
from mcore.backend.parallel import to_device
from mcore.bridge.families import dims_of
from mcore.data.dataset import TokenDataset
from mcore.data.template import Sample
from mcore.errors import Problem, StoppedError, TrainingError
from mcore.progress import Advance, progress, say
from mcore.train.bad_steps import put_back, router_biases, update_unless, what_is_wrong
from mcore.train.batches import Batching, MicroBatch
from mcore.train.context import length_multiples, part_of_batch
from mcore.train.flops import ModelFlops
from mcore.train.garbage import frozen_garbage
from mcore.train.metrics import Step, TrainingLog
from mcore.train.model import Training
from mcore.train.position import Position
from mcore.train.saving import Saver
from mcore.train.schedule import Schedule
from mcore.train.stop import StopRequest, TimeLimit
from mcore.train.tuners.dropout import seed_step


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step; all ranks have the same.

    Attributes:
        step: Its figures.
        wrong: What is wrong with it, so that its update was left out; else empty.
        is_asked: Whether any rank was asked to stop.
        is_late: Whether the run's time is up.
        num_writing: Ranks that still write a checkpoint.
    """

    step: Step
    wrong: str
    is_asked: bool
    is_late: bool
    num_writing: int


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
        self.flops = ModelFlops.of(self.hf_config)
        self.log: TrainingLog | None = None  # rank 0's
        self.time_limit = TimeLimit(self.config.exit_duration_in_mins, self.stop.since_s)
        self.saver = Saver(
            config=self.config,
            schedule=self.schedule,
            layout=self.layout,
            output=self.output,
            training=self.training,
            hf_config=self.hf_config,
        )
        self.forward_backward = get_forward_backward_func()
        of_row, of_sample = length_multiples(self.layout, self.config.token_multiple)
        self.batching = Batching(
            micro_batch_size=self.config.micro_batch_size,
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            same_length=self.layout.pipeline_model_parallel_size > 1,
            length_multiple=of_row,
            sample_multiple=of_sample,
            count_multiple=self.config.interleaved_stages,
            packing_length=self.packing_length,
            cost=self._cost,
        )

    def run(self, position: Position) -> None:
        """Train from `position` to the end.

        Raises:
            StoppedError: SIGTERM came, or the time was up; the step was finished and saved.
            TrainingError: A loss or a gradient is not finite or a spike, and the run must not pass over it.
        """
        first, last = position.iteration, self.schedule.train_iters
        bar: AbstractContextManager[Advance] = nullcontext(lambda count=1, note="": None)
        if dist.get_rank() == 0:
            bar = progress("train", last, "steps", done=first)
            self.log = TrainingLog(
                self.output,
                iteration=first if first else -1,
                consumed_tokens=position.consumed_tokens,
                logging_steps=self.config.logging_steps,
                world_size=dist.get_world_size(),
            )
            if self.packing_length is not None and first < last:
                samples = self.data.batch(position.consumed_samples, self.config.global_batch_size)
                say(f"train: packing: iteration {first + 1} takes {self.batching.describe(samples)}")
        try:
            if first == 0:
                self.validate(0)
            else:
                self.saver.make_up(first)
            with frozen_garbage(), bar as advance:
                self._steps(position, advance)
            if self.log:
                self.log.summarise()
        except TrainingError:  # which all ranks raise
            self.saver.finish()
            raise
        finally:
            if self.log:
                self.log.close()

    def _steps(self, position: Position, advance: Advance) -> None:
        last = self.schedule.train_iters
        while position.iteration < last:
            before, outcome = position, self.step(position)
            position = self._pass_over(position, outcome) if outcome.wrong else self._record(position, outcome.step)
            note = f"loss {outcome.step.loss:.4f}, {outcome.step.tokens_per_s:.0f} tokens/s"
            advance(position.iteration - before.iteration, note)
            if position.iteration > before.iteration:
                self._validate_and_save(position, outcome)

    def _record(self, position: Position, step: Step) -> Position:
        """Record a good step. Returns the position behind it."""
        remembered = None if self.config.loss_spike_factor is None else step.loss
        num_samples = self.config.global_batch_size
        position = position.after(num_samples=num_samples, num_tokens=step.tokens, loss=remembered)
        if self.log:
            is_last = position.iteration == self.schedule.train_iters
            self.log.step(step, consumed_samples=position.consumed_samples, last=is_last)
        return position

    def _pass_over(self, position: Position, outcome: Outcome) -> Position:
        """Record a bad step. Returns where the run goes on.

        Raises:
            TrainingError: It must not; names the samples.
        """
        iteration, size = position.iteration + 1, self.config.global_batch_size
        why = f"iteration {iteration}: {outcome.wrong}"
        is_skipped = self.config.bad_step_policy == "skip"
        so_far = position.bad_in_a_row if is_skipped else position.rollbacks
        if self.config.bad_step_policy == "stop" or so_far == self.config.max_bad_steps:
            places = range(position.consumed_samples, position.consumed_samples + size)
            samples = (
                Problem(f"sample {self.data.sample_index(place)} ({sample.place})")
                for place, sample in zip(places, self.data.batch(places.start, size), strict=True)
            )
            behind = f" ({so_far} bad steps {'in a row' if is_skipped else 'led back'} before)" if so_far else ""
            raise TrainingError(why + behind, samples)
        if is_skipped:
            position = position.after_skipping(num_samples=size)
            if self.log:
                say(f"{why}; its update is left out")
                self.log.bad_step(iteration, outcome.wrong, consumed_samples=position.consumed_samples)
            return position
        with self.training.gathering.whole():
            to = self.saver.load_last_on_schedule(why)
        position = position.after_rollback(to, num_samples=size)
        if self.log:
            passed_over = position.consumed_samples - to.consumed_samples
            say(f"{why}; back to iteration {to.iteration}, and on from there {passed_over} samples further on")
            self.log.go_back(to.iteration, to.consumed_tokens)
            figures = {"passed_over_samples": passed_over, "rollbacks": position.rollbacks}
            self.log.bad_step(to.iteration + 1, outcome.wrong, bad_iteration=iteration, **figures)
        return position

    def _validate_and_save(self, position: Position, outcome: Outcome) -> None:
        """Do what is due behind a step.

        Raises:
            StoppedError: The run has to leave; it saved.
        """
        iteration, last = position.iteration, self.schedule.train_iters
        is_last, is_leaving = iteration == last, outcome.is_asked or outcome.is_late
        if is_last or iteration % (self.config.eval_steps or self.config.save_steps) == 0:
            self.validate(iteration)
        if is_last or is_leaving or iteration % self.config.save_steps == 0:
            if self.log:
                self.log.sync()
            with self.training.gathering.whole():
                self.saver.save(position, in_background=self.config.async_save and not is_last and not is_leaving)
        elif outcome.num_writing == 0:
            self.saver.finish()
        if is_leaving and not is_last:
            why = "asked to stop" if outcome.is_asked else "the time is up"
            raise StoppedError(
                f"{why}: iteration {iteration} of {last} is saved",
                [Problem(str(self.output), fix="Run the same command again to go on.")],
            )

    def step(self, position: Position) -> Outcome:
        """Make one step; its update is left out if anything is wrong with it."""
        start_s = time.perf_counter()
        config, optimizer, modules = self.config, self.training.optimizer, self.training.modules
        iteration = position.iteration + 1
        samples = self.data.batch(position.consumed_samples, config.global_batch_size)
        if config.lora_dropout and self.training.adapters is not None:
            seed_step(config.seed, iteration)
        lengths = [len(sample.token_ids) for sample in samples]
        num_trained = sum(sample.num_trained for sample in samples)
        set_trained_share(modules, num_trained / max(1, sum(lengths) - len(lengths)))
        for chunk in self.training.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        biases = router_biases(modules) if config.bad_step_policy == "skip" else []
        loss_sum = self._forward(samples, train=True)
        lr = get_canonical_lr_for_logging(optimizer.param_groups)
        is_late = dist.get_rank() == 0 and self.time_limit.is_up(self.saver.longest_s)
        sums = self._sum_over_ranks(loss_sum, self.stop.received, is_late, self.saver.is_writing)

        def wrong(grad_norm: float) -> str:
            recent, factor = position.recent_losses, config.loss_spike_factor
            # Only here the loss is waited for: a GPU has got all the work by then that the gradient norm is made by.
            return what_is_wrong(float(sums[0]) / num_trained, grad_norm, recent_losses=recent, spike_factor=factor)

        grad_norm = update_unless(optimizer, lambda norm: bool(wrong(norm)))
        loss_total, *numbers = sums.tolist()
        loss = loss_total / num_trained
        if wrong(grad_norm):
            put_back(biases)
        else:
            self.training.gathering.begin()
        self.training.scheduler.step(1)
        tokens_LE = []
        if any(self.dims.moe_layers):
            all_LE = take_expert_tokens(modules, self.dims.num_layers, self.dims.size("experts"))
            tokens_LE = [of_layer for of_layer, is_moe in zip(all_LE, self.dims.moe_layers, strict=True) if is_moe]
        step = Step(
            iteration=iteration,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            step_time_s=time.perf_counter() - start_s,
            tokens=sum(lengths),
            flops=self.flops.of_step(lengths, num_trained, is_frozen=self.training.adapters is not None),
            expert_tokens=tokens_LE,
        )
        num_asked, num_late, num_writing = map(int, numbers)
        return Outcome(step, wrong(grad_norm), num_asked > 0, num_late > 0, num_writing)

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
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad(), self.training.gathering.whole():
            for start in range(0, len(by_length), self.config.global_batch_size):
                loss_sum += self._forward(by_length[start : start + self.config.global_batch_size], train=False)
        for chunk in self.training.chunks:
            chunk.train()
        loss = float(self._sum_over_ranks(loss_sum)) / self.validation.num_trained_tokens
        if not math.isfinite(loss):
            raise TrainingError(f"iteration {iteration}: validation loss {loss}")
        if self.log:
            self.log.validation(iteration, loss)
            say(
                f"iteration {iteration}: validation loss {loss:.4f} "
                f"({len(self.validation)} samples, {time.perf_counter() - start_s:.1f} s)"
            )

    def _forward(self, samples: Sequence[Sample], *, train: bool) -> Tensor:
        """Forward (and backward) of this rank's share of the samples.

        Returns:
            The sum of its trained tokens' losses, not waited for; 0 on ranks without the last pipeline stage.
        """
        size, rank = self.layout.context_parallel_size, parallel_state.get_context_parallel_rank()
        whole: list[MicroBatch] = self.batching.micro_batches(samples, self.device)
        batches = [part_of_batch(batch, size, rank) for batch in whole]
        chunks = list(self.training.chunks)
        iterators = [iter(batches) for _ in chunks]  # every part of the model reads all of them
        losses = self.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(batches),
            seq_length=whole[0].tokens_BS.shape[1],
            micro_batch_size=len(whole[0].tokens_BS),  # packed samples are one row
            forward_only=not train,
        )
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        return sum((record["loss_sum"].double() for record in losses), none)

    def _cost(self, sample: Sample) -> float:
        return self.flops.of_step([len(sample.token_ids)], sample.num_trained)

    def _sum_over_ranks(self, loss_sum: Tensor, *others: float) -> Tensor:
        """Sums over all ranks, fp64; the loss only counts once for each tensor parallel group."""
        counts = parallel_state.get_tensor_model_parallel_rank() == 0
        sums = to_device(torch.tensor([0.0, *others], dtype=torch.float64), self.device)
        sums[0] = loss_sum if counts else 0.0
        dist.all_reduce(sums)
        return sums
