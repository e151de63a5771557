"""`launch`: where and how child processes run. Nothing here but the number of processes changes a result."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import StrictModel
from configs.schema.cluster import KubernetesConfig, SlurmConfig

StageName = Literal[
    "fetch",
    "prepare",
    "convert",
    "verify_convert",
    "train",
    "select",
    "export",
    "verify_export",
    "verify_served",
    "evaluate_base",
    "evaluate_tuned",
    "compare",
    "promote",
]
"""The stages of `tasks/graph.py`."""


class LaunchConfig(StrictModel):
    """Processes and limits of the child stages."""

    nproc_per_node: int = Field(default=1, ge=1)
    """Training processes on each machine (torchrun's `--nproc_per_node`): one a GPU, or a few on a CPU."""
    nnodes: int = Field(default=1, ge=1)
    """Machines that training runs on (torchrun's `--nnodes`). The store, and all that the run names, must be on a file
    system that they share; the other stages run on one."""
    launcher: Literal["local", "slurm", "kubernetes"] = "local"
    """Who starts training. `local`: this machine is the first, and `mcore-flows node` was started on the others.
    `slurm` and `kubernetes`: a job of theirs (`slurm`, `kubernetes`), on one machine or on several."""
    rdzv_endpoint: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?:[0-9]{1,5}$"
    )
    """`host:port` of the first machine, where the processes find each other (torchrun's `--rdzv_endpoint`); for several
    machines with `launcher: local` alone."""
    socket_ifname: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$")
    """Network interface, of the same name on every machine, that the processes talk over (GLOO_SOCKET_IFNAME,
    NCCL_SOCKET_IFNAME); the one that leads to `rdzv_endpoint` if unset."""
    join_timeout_s: float = Field(default=600.0, ge=1)
    """Seconds that the machines wait for each other when training starts."""
    slurm: SlurmConfig | None = None
    """What Slurm is asked for, with `launcher: slurm` alone."""
    kubernetes: KubernetesConfig | None = None
    """What Kubernetes is asked for, with `launcher: kubernetes` alone."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Seconds a stage may take before its whole process tree is ended; no limit if unset."""
    stage_timeout_s: dict[StageName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Seconds that single stages may take, by name, in place of `timeout_s`; `{train: 86400.0}` is a day of
    training."""
    stall_timeout_s: float | None = Field(default=None, gt=0)
    """Seconds in which training may neither write to `metrics.jsonl` (it does every `train.logging_steps` steps) nor
    begin a checkpoint. Then the stacks of its processes are written beside its log, it is ended, and started again as
    after any infrastructure error; no limit if unset. Give it more than a start, a validation or a save takes."""
    grace_s: float = Field(default=120.0, gt=0)
    """Seconds that training gets to finish its step and save when it is cancelled or its time is up. They count even if
    the run itself is gone by then."""
    reattach_s: float = Field(default=0.0, ge=0)
    """Seconds that a stage's command goes on if the flow that started it is killed, so that the same run, started again
    on this machine, takes it over where it is; then it is ended as after a cancel. At 0 it is ended at once, unless
    another run waits for the same artifact: that one takes it over."""
    retries: int = Field(default=2, ge=0)
    """How often a stage is started again after an infrastructure error. A failed gate or a wrong input never is."""
    retry_delay_s: float = Field(default=10.0, ge=0)
    """Seconds before the first retry; doubled each time."""
    again: dict[StageName, Annotated[str, Field(min_length=1, max_length=100)]] = Field(default_factory=dict)
    """Stages to make again, with all behind them, although the store has them: each with a word of your own, such as a
    date. The same word finds what was made for it, another makes the stage once more; earlier artifacts stay. `resume
    --from` and nightly retraining fill this in."""
    devices: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """GPUs of this machine that training and evaluation may take, by `nvidia-smi`'s numbers; any if unset. As many as a
    stage has processes are held while it runs; a run that finds too few free waits. Of a machine without GPUs these are
    numbers of slots."""
    device_slots: int | None = Field(default=None, ge=1)
    """Training and evaluation processes that a machine without GPUs may have at once, over all runs that give this
    number; not counted if unset."""
    device_locks: str = "/dev/shm/mcore-flows-devices"
    """Folder, on this machine and not on a network, in which runs see each other's devices. Containers that share GPUs
    have to share it."""
    check_collectives: Literal["auto", "always", "never"] = "auto"
    """Whether the processes of a training on this machine do a tiny all-reduce before anything is started. `auto`: on
    GPUs alone, as it takes some seconds."""
    store: str = "store"
    """Folder of the artifact store, relative to the working directory."""

    @model_validator(mode="after")
    def _launcher_has_what_it_needs(self) -> Self:
        problems = []
        for name, settings in (("slurm", self.slurm), ("kubernetes", self.kubernetes)):
            if settings is not None and self.launcher != name:
                problems.append(f"launch.{name} belongs to launcher: {name}, found launcher: {self.launcher}")
        if self.launcher == "kubernetes" and self.kubernetes is None:
            problems.append("launcher: kubernetes needs launch.kubernetes")
        by_hand = self.launcher == "local" and self.nnodes > 1
        if by_hand and self.rdzv_endpoint is None:
            problems.append(f"nnodes: {self.nnodes} with launcher: local needs rdzv_endpoint")
        if not by_hand and self.rdzv_endpoint is not None:
            problems.append("rdzv_endpoint needs launcher: local and nnodes of at least 2")
        if self.socket_ifname is not None and self.nnodes == 1:
            problems.append("socket_ifname needs nnodes of at least 2")
        if self.rdzv_endpoint is not None and not 0 < int(self.rdzv_endpoint.rpartition(":")[2]) < 65536:
            problems.append(f"rdzv_endpoint needs a port from 1 to 65535, found {self.rdzv_endpoint}")
        if self.slurm is not None and (minutes := self.slurm.time_limit_minutes) and 60 * minutes <= 2 * self.grace_s:
            problems.append(
                f"slurm.time_limit_minutes ({minutes}) must be more than twice grace_s ({self.grace_s:g} s): training "
                "saves and leaves that long before the end"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def num_processes(self) -> int:
        """Training processes on all machines."""
        return self.nnodes * self.nproc_per_node

    @property
    def is_single_machine(self) -> bool:
        """Whether training runs as a child of the flow, and nowhere else."""
        return self.launcher == "local" and self.nnodes == 1

    def timeout_of(self, stage: str) -> float | None:
        """Seconds that a stage may take; None for no limit."""
        of_stages = {str(name): limit_s for name, limit_s in self.stage_timeout_s.items()}
        return of_stages.get(stage, self.timeout_s)
