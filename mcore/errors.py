"""The one exception tree of the project, and how an error crosses a process border.

    PipelineError                 exit status 1   a stage failed
    ├── InputError                exit status 2   what was given is wrong; nothing was started
    │   ├── ConfigError                           a run file or an option
    │   ├── SourceError                           a model source that is missing or can't be reached
    │   ├── DataError                             a dataset file or row
    │   ├── WeightPlanError                       names, shapes or dtypes of weights do not fit the family's table
    │   └── CheckpointError                       a checkpoint is missing, damaged, incomplete, or another model's
    ├── GateError                 exit status 3   a gate said no; nothing was published
    │   ├── PrecisionError                        a structural or numerical proof failed
    │   └── EvaluationGateError                   the tuned model is not good enough
    ├── ConversionError                           reading or writing weights failed
    ├── TrainingError                             training went wrong (NaN, no progress)
    ├── SavingError                               training's state was not saved, or not loaded as it was saved
    ├── EvaluationError                           the evaluation engine failed
    ├── ArtifactError                             the artifact store can't do what was asked
    │   └── FencedError                           another run has taken over what this one was making
    └── LaunchError                               a child process ended badly
        └── InfrastructureError                   … for a reason that a retry may cure (killed, lost, I/O)
            └── StoppedError      exit status 75  … because it was asked to; it goes on when started again

An error carries *all* problems that were found. Each problem names the object, what was expected, what was found and
what to do. A child process writes its error to a JSON file (`mcore/child.py`); the parent raises the same class again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_GATE = 3
EXIT_RESUME = 75
"""Left on request, with what could be saved: run the same command again (sysexits' EX_TEMPFAIL)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: the object it is about, what was expected, what was found, and what to do about it."""

    subject: str
    expected: str = ""
    found: str = ""
    fix: str = ""

    def __str__(self) -> str:
        parts = [self.subject]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.found:
            parts.append(f"found {self.found}")
        text = parts[0] if len(parts) == 1 else f"{parts[0]}: {', '.join(parts[1:])}"
        return f"{text}. {self.fix}" if self.fix else text


class PipelineError(Exception):
    """Base of all errors that this project raises on purpose.

    Args:
        summary: One line that says what could not be done.
        problems: Every finding, all at once. Plain strings are taken as the subject of a problem.
    """

    exit_status: ClassVar[int] = EXIT_FAILED

    advice: str = ""
    """What the digest of a failure adds: its class, what was probably behind it, what to do next."""
    is_transient: bool = False
    """Whether the digest says that the same attempt may succeed."""

    def __init__(self, summary: str, problems: Iterable[Problem | str] = ()) -> None:
        self.summary = summary
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__(summary, self.problems)

    def __str__(self) -> str:
        advice = [self.advice] if self.advice else []
        return "\n".join([self.summary, *(f"  - {problem}" for problem in self.problems), *advice])

    def details(self) -> dict[str, Any]:
        """Further fields that this class keeps across a process border."""
        return {}

    def to_json(self) -> str:
        """The error as a JSON text that `error_from_json` turns back into the same class."""
        return json.dumps(
            {
                "error": type(self).__name__,
                "summary": self.summary,
                "problems": [asdict(problem) for problem in self.problems],
                "details": self.details(),
            },
            indent=2,
        )


class InputError(PipelineError):
    """What was given is wrong. Raised before anything is started, or with nothing left of what was begun."""

    exit_status = EXIT_INPUT


class ConfigError(InputError):
    """A run file, an override or an option is wrong."""


class SourceError(InputError):
    """A model source is missing or can't be reached."""


class DataError(InputError):
    """A dataset file is missing, or rows of it are malformed."""


class WeightPlanError(InputError):
    """The weights on one side do not fit the family's table: missing, unclaimed, doubly claimed, misshapen."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or incomplete, or does not hold the model that it should."""


class GateError(PipelineError):
    """A gate said no. What it guards is not published."""

    exit_status = EXIT_GATE


class PrecisionError(GateError):
    """A structural (bitwise) or numerical (logits) proof failed."""


class EvaluationGateError(GateError):
    """The tuned model is not good enough to go on."""


class ConversionError(PipelineError):
    """Reading or writing weights failed."""


class TrainingError(PipelineError):
    """Training went wrong: a loss that is not finite, data that ran out."""


class SavingError(PipelineError):
    """Training's state could not be saved, or what was loaded is not what was saved."""


class EvaluationError(PipelineError):
    """The evaluation engine failed, as opposed to the model failing its gate."""


class ArtifactError(PipelineError):
    """The artifact store can't do what was asked."""


class FencedError(ArtifactError):
    """Another run has taken over what this one was making, so this one must not publish it."""


class LaunchError(PipelineError):
    """A child process ended badly and left no error of its own.

    Args:
        summary: One line.
        problems: Findings.
        returncode: Exit status; negative is the signal that ended the process.
        log_path: The file that holds all its output.
        tail: The last lines of that output.
    """

    def __init__(
        self,
        summary: str,
        problems: Iterable[Problem | str] = (),
        *,
        returncode: int | None = None,
        log_path: Path | str | None = None,
        tail: str = "",
    ) -> None:
        self.returncode = returncode
        self.log_path = str(log_path) if log_path is not None else None
        self.tail = tail
        super().__init__(summary, problems)

    def __str__(self) -> str:
        text = super().__str__()
        if self.log_path:
            text += f"\nAll its output: {self.log_path}"
        if self.tail:
            text += f"\nIts last lines:\n{self.tail}"
        return text

    def details(self) -> dict[str, Any]:
        """Exit status, log file and last lines."""
        return {"returncode": self.returncode, "log_path": self.log_path, "tail": self.tail}


class InfrastructureError(LaunchError):
    """A child process was lost for a reason outside the work itself; running it again may succeed."""


class StoppedError(InfrastructureError):
    """A run or its training left because it was asked to (SIGTERM, Ctrl-C); started again, it goes on from there."""

    exit_status = EXIT_RESUME


def _all_classes(base: type[PipelineError]) -> dict[str, type[PipelineError]]:
    found = {base.__name__: base}
    for child in base.__subclasses__():
        found |= _all_classes(child)
    return found


def error_from_json(text: str) -> PipelineError:
    """The error that `PipelineError.to_json` wrote, as an instance of the same class.

    Raises:
        ValueError: The text is not such a JSON document.
    """
    try:
        data = json.loads(text)
        cls = _all_classes(PipelineError)[data["error"]]
        return cls(data["summary"], [Problem(**problem) for problem in data["problems"]], **data["details"])
    except (KeyError, TypeError, json.JSONDecodeError) as exc:
        raise ValueError(f"not an error document: {exc!r}") from exc
