"""`launch`: where and how child processes run. Nothing here but the number of processes changes a result."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import StrictModel

StageName = Literal[
    "fetch",
    "convert",
    "verify_convert",
    "train",
    "select",
    "export",
    "verify_export",
    "evaluate_base",
    "evaluate_tuned",
    "compare",
    "promote",
]
"""The stages of `tasks/graph.py`."""


class LaunchConfig(StrictModel):
    """Processes and limits of the child stages."""

    nproc_per_node: int = Field(default=1, ge=1)
    """Training processes on this machine (torchrun's `--nproc_per_node`): one a GPU, or a few on a CPU."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Seconds a stage may take before its whole process tree is ended; no limit if unset."""
    stage_timeout_s: dict[StageName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Seconds that single stages may take, by name, in place of `timeout_s`; `{train: 86400.0}` is a day of
    training."""
    stall_timeout_s: float | None = Field(default=None, gt=0)
    """Seconds in which training may neither write to `metrics.jsonl` (it does every `train.logging_steps` steps) nor
    begin a checkpoint. Then the stacks of its processes are written beside its log, it is ended, and started again as
    after any infrastructure error; no limit if unset. Give it more than a start, a validation or a save takes."""
    grace_s: float = Field(default=120.0, gt=0)
    """Seconds that training gets to finish its step and save when it is cancelled or its time is up. They count even if
    the run itself is gone by then."""
    retries: int = Field(default=2, ge=0)
    """How often a stage is started again after an infrastructure error. A failed gate or a wrong input never is."""
    retry_delay_s: float = Field(default=10.0, ge=0)
    """Seconds before the first retry; doubled each time."""
    again: dict[StageName, Annotated[str, Field(min_length=1, max_length=100)]] = Field(default_factory=dict)
    """Stages to make again, with all behind them, although the store has them: each with a word of your own, such as a
    date. The same word finds what was made for it, another makes the stage once more; earlier artifacts stay. `resume
    --from` and nightly retraining fill this in."""
    store: str = "store"
    """Folder of the artifact store, relative to the working directory."""

    def timeout_of(self, stage: str) -> float | None:
        """Seconds that a stage may take; None for no limit."""
        of_stages = {str(name): limit_s for name, limit_s in self.stage_timeout_s.items()}
        return of_stages.get(stage, self.timeout_s)
