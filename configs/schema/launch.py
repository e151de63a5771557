"""`launch`: where and how child processes run. Nothing here but the number of processes changes a result."""

from __future__ import annotations

from pydantic import Field

from configs.schema.base import StrictModel


class LaunchConfig(StrictModel):
    """Processes and limits of the child stages."""

    nproc_per_node: int = Field(default=1, ge=1)
    """Training processes on this machine (torchrun's `--nproc_per_node`): one a GPU, or a few on a CPU."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Seconds a stage may take before its whole process tree is ended; no limit if unset."""
    retries: int = Field(default=2, ge=0)
    """How often a stage is started again after an infrastructure error. A failed gate or a wrong input never is."""
    retry_delay_s: float = Field(default=10.0, ge=0)
    """Seconds before the first retry; doubled each time."""
    store: str = "store"
    """Folder of the artifact store, relative to the working directory."""
