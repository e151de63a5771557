"""Cut from the pipeline: a Hugging Face model as a proven megatron-core checkpoint, and no more."""

from __future__ import annotations

from prefect import flow

from configs.schema.run import RunConfig
from tasks.convert import convert
from tasks.fetch import fetch
from tasks.plan import plan
from tasks.stage import Outcome
from tasks.turn import alone
from tasks.verify import verify_convert


@flow(name="convert-only", flow_run_name="{run.name}")
def convert_only(run: RunConfig) -> tuple[Outcome, ...]:
    """Convert the base model of a run, and prove it. The pipeline finds both in the store afterwards.

    Args:
        run: The run, as in `configs/runs/*.yaml`.
    """
    planned = plan(run)
    with alone(planned):
        hf = planned.local_model or fetch(planned)
        base = convert(planned, hf=hf)
        verify_convert(planned, hf=hf, mcore=base)
    return tuple(planned.outcomes)
