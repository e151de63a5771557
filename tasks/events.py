"""Events that automations of the Prefect server wait for."""

from __future__ import annotations

from prefect.events import emit_event

from mcore.errors import GateError

GATE_FAILED = "mcore-flows.gate.failed"


def tell_gate_failed(run: str, stage: str, artifact: str, error: GateError) -> None:
    """Tell the server that a gate said no; the event is about the run, and related to the flow run that it is sent in.

    Args:
        run: Name of the run.
        stage: The stage that the gate is in.
        artifact: `kind/key` of what it did not let through.
        error: What it said.
    """
    emit_event(
        GATE_FAILED,
        resource={"prefect.resource.id": f"mcore-flows.run.{run}", "prefect.resource.name": run},
        payload={
            "stage": stage,
            "artifact": artifact,
            "error": type(error).__name__,
            "summary": error.summary,
            "problems": [str(problem) for problem in error.problems],
        },
    )
