"""The event that says that a data set was updated; `prefect.yaml` has the trigger that retrains on it."""

from __future__ import annotations

from pathlib import Path

from prefect.events import Event, Resource

from flows.api_server import server_client
from mcore.artifacts import file_digest

UPDATED = "mcore-flows.dataset.updated"


def tell_updated(files: list[Path]) -> list[str]:
    """Send one event a file, with its path and digest.

    Returns:
        The digests.

    Raises:
        ConfigError: No server answers.
        OSError: A file can't be read; nothing was sent.
    """
    digests = [file_digest(file) for file in files]
    events = [
        Event(
            event=UPDATED,
            resource=Resource({
                "prefect.resource.id": f"mcore-flows.dataset.{file.name}",
                "prefect.resource.name": file.name,
            }),
            payload={"path": str(file.absolute()), "sha256": digest, "bytes": file.stat().st_size},
        )
        for file, digest in zip(files, digests, strict=True)
    ]  # fmt: skip
    with server_client() as client:
        client.request("POST", "/events", json=[event.model_dump(mode="json") for event in events])
    return digests
