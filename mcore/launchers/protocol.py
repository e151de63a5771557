"""What a launcher can do, whoever that is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Phase = Literal["waiting", "running", "done", "failed", "stopped", "lost", "cancelled", "out_of_memory"]
"""`stopped`: it saved and left, or its time was up. `lost`: for a reason outside the work. `cancelled`: by somebody."""

ENDED: frozenset[Phase] = frozenset({"done", "failed", "stopped", "lost", "cancelled", "out_of_memory"})


@dataclass(frozen=True, slots=True)
class JobState:
    """Where a job stands.

    Attributes:
        phase: In what phase it is.
        reason: More about that, in the launcher's words or ours; may be empty.
        status: Exit status, if it ended by itself.
    """

    phase: Phase
    reason: str = ""
    status: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs or will run."""
        return self.phase in ENDED

    def __str__(self) -> str:
        return f"{self.phase} ({self.reason})" if self.reason else self.phase


class Launcher(Protocol):
    """Starts one job, or goes on with the one that an earlier flow started.

    Attributes:
        outlives_flow: Whether the job goes on if the flow is killed.
        poll_s: Seconds between two questions.
    """

    outlives_flow: bool
    poll_s: float

    def start_or_attach(self) -> str:
        """Have one such job and no more; says in words what was done.

        Raises:
            LaunchError: It can't be started.
        """

    def poll(self) -> JobState:
        """Where it stands. An unreachable scheduler is no end of the job: the last known state comes back."""

    def ask_to_end(self) -> None:
        """Have its processes save and leave; one that does not run yet is taken back."""

    def end(self) -> None:
        """End it whatever it does."""

    def logs(self) -> list[Path]:
        """Files that its output goes to, as far as they are there."""

    def folder(self) -> Path | None:
        """Folder of the newest start, with its error document; None if there is none yet."""
