"""The whole line: a Hugging Face model in, a tuned and proven one out."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from configs.schema.run import RunConfig
from tasks.approval import agreed
from tasks.compare import compare
from tasks.convert import convert
from tasks.evaluate import evaluate_base, evaluate_tuned
from tasks.export import export
from tasks.fetch import fetch
from tasks.overlap import note_overlap
from tasks.plan import plan
from tasks.prepare import prepare
from tasks.promote import promote
from tasks.publish import publish
from tasks.report import reported
from tasks.select import select
from tasks.served import verify_served
from tasks.stage import Outcome
from tasks.train import train
from tasks.turn import alone
from tasks.verify import verify_convert, verify_export


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to.

    Attributes:
        name: Name of the run.
        outcomes: Its stages in the order they ran: reused or not, seconds, artifact.
        model: Link to the published model, or to the published adapter.
    """

    name: str
    outcomes: tuple[Outcome, ...]
    model: str


@flow(name="pipeline", flow_run_name="{run.name}")
def pipeline(run: RunConfig) -> RunResult:
    """Take a Hugging Face model through Megatron-core and back, and prove every step.

    A stage whose artifact is there is Cached. A gate that says no fails the run, and nothing is published.

    Args:
        run: The run, as in `configs/runs/*.yaml`.

    Raises:
        InputError: The run can't work; nothing was started.
        GateError: A proof or the evaluation said no.
        PipelineError: A stage failed.
    """
    planned = plan(run)
    with alone(planned), reported(planned):
        # The run's rows as the base model's tokens: what can't be used is found before anything long begins.
        hf = planned.local_model or fetch(planned)
        data = prepare(planned, hf=hf)
        note_overlap(planned, data)

        # The base model as Hugging Face folder and as megatron-core checkpoint, and the proof that both are the same.
        base = convert(planned, hf=hf)
        base_proof = verify_convert(planned, hf=hf, mcore=base)

        # Training starts from what is proven, and one of its checkpoints goes on.
        start = hf if run.train.load_safetensors else base
        trained = train(planned, base=start, data=data, proof=base_proof)
        chosen = select(planned, trained=trained)

        # Back to Hugging Face, and proven again: a whole model, or an adapter on top of the base.
        tuned = export(planned, trained=trained, selection=chosen, base=base)
        model, beside = (tuned, {}) if run.export.merge_lora else (hf, {"adapter": tuned})
        tuned_proof = verify_export(planned, hf=model, mcore=trained, selection=chosen, base=base, **beside)

        # Both models answer the same questions in vLLM, and the tuned one must be good enough.
        if run.evaluate is not None:
            base_answers = evaluate_base(planned, model=hf)
            proofs = {"proof": tuned_proof}
            if run.evaluate.num_served_prompts:
                proofs["served"] = verify_served(planned, model=model, base=hf, proof=tuned_proof, **beside)
            tuned_answers = evaluate_tuned(planned, model=model, **proofs, **beside)
            compared = compare(planned, base=base_answers, tuned=tuned_answers)

        # Only a run whose gates all said yes comes here.
        link = publish(planned, tuned)

        # An alias moves to the model if it is better than the one in production, and if whoever is asked agrees.
        if run.promote is not None:
            grounds = {"base_proof": base_proof, "proof": tuned_proof, "comparison": compared}
            agreed(planned, model=tuned, **grounds)
            promote(planned, model=tuned, **grounds)
    return RunResult(run.name, tuple(planned.outcomes), link)
