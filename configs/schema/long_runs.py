"""Fields of `train` that keep a long run going: how it saves, when it leaves, and what it does about bad steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.base import StrictModel


class LongRunFields(StrictModel):
    """Saving beside training, time limits, bad steps, and data that changed on the way."""

    async_save: bool = False
    """Write checkpoints while training goes on; takes host memory for one more copy of what is saved. A checkpoint
    counts once all of it is on disk, as without."""
    exit_duration_in_mins: float | None = Field(default=None, gt=0)
    """Minutes after which a process has saved and left, to be started again where it stopped; null for no limit. It
    leaves earlier by what a step and a save took at most."""
    bad_step_policy: Literal["stop", "skip", "rollback"] = "stop"
    """What is done about a step whose loss or gradient is not finite, or whose loss is a spike. Its update is left out
    in any case. `stop` ends the run; `skip` goes on with the next step; `rollback` goes back to the last checkpoint on
    schedule and on from there behind the data of the bad step, and ends the run if there is no checkpoint yet."""
    max_bad_steps: int = Field(default=3, ge=1)
    """Bad steps in a row that `skip` takes, or times that `rollback` goes back in the whole run; one more ends the
    run."""
    loss_spike_factor: float | None = Field(default=None, gt=1)
    """A loss is a spike if it is more than this many times the median of the last good ones (32 of them, and no fewer
    than 8); null for no such check."""
    accept_changed_data: bool = False
    """Go on from checkpoints of a run with other data, template or batch size, which is refused otherwise. The position
    in the data is kept, counted in samples, and `metrics.jsonl` records what changed."""

    def long_run_problems(self) -> list[str]:
        """Settings that have no meaning without another."""
        if self.bad_step_policy == "stop" and self.max_bad_steps != LongRunFields.model_fields["max_bad_steps"].default:
            return ["max_bad_steps needs bad_step_policy: skip or rollback"]
        return []
