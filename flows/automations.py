"""What the Prefect server does by itself: runs that went silent are Crashed, and a gate that says no is told."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from prefect.client.schemas.objects import StateType
from prefect.events import AutomationCore, ChangeFlowRunState, DoNothing, EventTrigger, Posture, SendNotification

from tasks.events import GATE_FAILED

TAG = "mcore-flows"
"""Tag of the deployments' runs: the server may have others, which these automations leave alone."""
HEARTBEAT = "prefect.flow-run.heartbeat"
ZOMBIES = "mcore-flows: a run without heartbeat has crashed"
GATES = "mcore-flows: a gate said no"


def zombies(silent_s: float) -> AutomationCore:
    """Runs that were killed so that nobody could say so: no heartbeat, and no other state, for so many seconds.

    Only the state changes, to what it is. A training that works on although its heartbeats got lost is not ended by it,
    and the store knows better in any case (`mcore-flows status`).
    """
    return AutomationCore(
        name=ZOMBIES,
        description=f"A run that sends no heartbeat for {silent_s:g} s was killed, or its machine is gone.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={"prefect.flow-run.*"},  # the next heartbeat, or a state: suspended, cancelled, ended
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silent_s),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"no heartbeat for {silent_s:g} s: killed, or its machine is gone. The same run goes on from "
                "what is in the store.",
            )
        ],
    )


def failed_gates(block: UUID | None) -> AutomationCore:
    """Tells somebody that a gate said no.

    Args:
        block: Notification block of Prefect's. Without one, nothing but the event feed of the UI shows it.
    """
    body = (
        "{{ event.resource.name }}: the gate {{ event.payload.stage }} said no. {{ event.payload.summary }}\n"
        "Nothing was published or promoted; the report of the run says what it found."
    )
    notify = None if block is None else SendNotification(block_document_id=block, subject=GATES, body=body)
    return AutomationCore(
        name=GATES,
        description="A proof, the evaluation or the comparison did not let a model through.",
        trigger=EventTrigger(
            expect={GATE_FAILED},
            match={"prefect.resource.id": "mcore-flows.run.*"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[DoNothing() if notify is None else notify],
    )
