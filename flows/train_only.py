"""Cut from the pipeline: a proven base and the training on it, and no more."""

from __future__ import annotations

from prefect import flow

from configs.schema.run import RunConfig
from tasks.convert import convert
from tasks.fetch import fetch
from tasks.plan import plan
from tasks.prepare import prepare
from tasks.stage import Outcome
from tasks.train import train
from tasks.turn import alone
from tasks.verify import verify_convert


@flow(name="train-only", flow_run_name="{run.name}")
def train_only(run: RunConfig) -> tuple[Outcome, ...]:
    """Train the base model of a run, converted and proven before. The pipeline finds the checkpoints in the store
    afterwards.

    Args:
        run: The run, as in `configs/runs/*.yaml`.
    """
    planned = plan(run)
    with alone(planned):
        hf = planned.local_model or fetch(planned)
        data = prepare(planned, hf=hf)
        base = convert(planned, hf=hf)
        base_proof = verify_convert(planned, hf=hf, mcore=base)
        train(planned, base=hf if run.train.load_safetensors else base, data=data, proof=base_proof)
    return tuple(planned.outcomes)
