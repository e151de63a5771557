"""What a job is to do: a file in the store that the flow writes and every machine reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from configs.schema.cluster import KubernetesConfig, SlurmConfig
from mcore.errors import ConfigError, Problem
from mcore.folders import write_durably

FILE = "orders.json"
RECORD_VARIABLE = "MCORE_FLOWS_RECORD"
"""Environment variable with the path of the record of the supervisor above."""


@dataclass(frozen=True, slots=True)
class Orders:
    """One job: the same command on every machine.

    Attributes:
        folder: The job's own folder, on a file system that all machines share. Each start has one below it, with the
            output of each machine, `node-0.log`, its supervisor's record, `node-0.json`, and the error that was told
            first, `error.json`.
        name: Name of the job, of the key of what it makes: two runs that want the same thing name the same job.
        launcher: Who starts it.
        nnodes: Machines.
        nproc_per_node: Processes of each.
        python: Interpreter on the machines.
        command: What torchrun starts: `-m`, a module, its arguments.
        cwd: Working directory on the machines.
        grace_s: Seconds to end by itself when it is asked to.
        stall_timeout_s: Seconds in which `progress` may stay as it is once it runs; None for no limit.
        progress: Files and folders that change while it comes further.
        done_file: File that is there once the job is complete.
        join_timeout_s: Seconds that machines wait for each other.
        rdzv_endpoint: `host:port` of the first machine; None where the launcher tells.
        socket_ifname: Network interface to talk over; None for the one that leads to the endpoint.
        slurm: What Slurm is asked for.
        kubernetes: What Kubernetes is asked for.
    """

    folder: Path
    name: str
    launcher: Literal["local", "slurm", "kubernetes"]
    nnodes: int
    nproc_per_node: int
    python: str
    command: tuple[str, ...]
    cwd: str
    grace_s: float
    stall_timeout_s: float | None
    progress: tuple[Path, ...]
    done_file: Path
    join_timeout_s: float
    rdzv_endpoint: str | None = None
    socket_ifname: str | None = None
    slurm: SlurmConfig | None = None
    kubernetes: KubernetesConfig | None = None

    @property
    def path(self) -> Path:
        """The file that holds them."""
        return self.folder / FILE

    def start_folder(self, start: str) -> Path:
        """Where one start of the job leaves what it says."""
        return self.folder / f"start-{start}"

    def write(self) -> None:
        """Replace the file in one step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fields = {name: getattr(self, name) for name in self.__slots__}
        write_durably(self.path, json.dumps(fields, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value.model_dump(mode="json")


def read_orders(path: Path) -> Orders:
    """The orders in a file.

    Raises:
        ConfigError: There are none.
    """
    try:
        found = json.loads(path.read_text())
        for name, model in (("slurm", SlurmConfig), ("kubernetes", KubernetesConfig)):
            if found[name] is not None:
                found[name] = model.model_validate(found[name])
        for name in ("folder", "done_file"):
            found[name] = Path(found[name])
        return Orders(**{**found, "command": tuple(found["command"]), "progress": tuple(map(Path, found["progress"]))})
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise ConfigError("there are no orders for this machine", [Problem(str(path), found=repr(exc))]) from exc


def job_folder(output: Path) -> Path:
    """The folder of the job that fills an unfinished artifact's folder: `<store>/.jobs/<kind>-<key>`.

    Named by what is made and not by the run, so that whoever wants the same finds the same job.
    """
    return output.absolute().parents[1] / ".jobs" / output.name


@dataclass(frozen=True, slots=True)
class Started:
    """What is kept of a job that was started, so that another process can go on watching it.

    Attributes:
        job: What the launcher calls it.
        start: The start that its output lies under.
    """

    job: str
    start: str

    def write(self, folder: Path) -> None:
        """Keep it in the job's folder."""
        write_durably(folder / STARTED, json.dumps(asdict(self)))


STARTED = "started.json"


def read_started(folder: Path) -> Started | None:
    """The job that was started last, unless that has ended."""
    try:
        return Started(**json.loads((folder / STARTED).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def forget_started(folder: Path) -> None:
    """The job has ended, and somebody knows how."""
    (folder / STARTED).unlink(missing_ok=True)
