"""`launch.slurm` and `launch.kubernetes`: what a scheduler is asked for. Names are checked: its files hold them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import StrictModel

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:+=/@-]{0,127}$")]
"""A name of Slurm's: no blank, quote, comment or sign that a shell or an #SBATCH line would read otherwise."""
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
"""A name of Kubernetes' (RFC 1123)."""
SAFE_PATH = r"^/[A-Za-z0-9_.,+=@/-]{0,1023}$"
"""Absolute paths that need no quotes anywhere."""


class SlurmConfig(StrictModel):
    """One job for a stage: `launch.nnodes` nodes with a task each, which starts `launch.nproc_per_node` processes."""

    partition: Word | None = None
    """Partition; Slurm's default if unset."""
    account: Word | None = None
    """Account that is charged; the user's default if unset."""
    qos: Word | None = None
    """Quality of service; the default if unset."""
    reservation: Word | None = None
    """Reservation to run in; none if unset."""
    constraint: Word | None = None
    """Features that the nodes must have; none if unset."""
    time_limit_minutes: int | None = Field(default=None, ge=2)
    """Minutes that a job may run. `launch.grace_s` before their end training saves and leaves, and a further job goes
    on; the partition's limit if unset, which training then does not know of."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    """GPUs of each node (`--gpus-per-node`); none are asked for if unset."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """Cores of each node (`--cpus-per-task`, as a node has one task); Slurm's default if unset."""
    mem_per_node_gib: int | None = Field(default=None, ge=1)
    """GiB of host memory of each node (`--mem`); Slurm's default if unset."""
    requeue: bool = True
    """Whether Slurm may start the job again after a preemption or the failure of a node; it then resumes."""
    poll_s: float = Field(default=10.0, gt=0)
    """Seconds between two questions to Slurm."""


class KubernetesConfig(StrictModel):
    """One object for a stage: `launch.nnodes` pods, each of which starts `launch.nproc_per_node` processes."""

    kind: Literal["jobset", "pytorchjob"] = "jobset"
    """What is made: a JobSet (jobset.x-k8s.io/v1alpha2) or a PyTorchJob of the training operator (kubeflow.org/v1)."""
    image: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./:@-]{0,254}$")
    """Image with this project installed, in the version of the flow."""
    python: str = Field(default="python", pattern=r"^[A-Za-z0-9_./-]{1,255}$")
    """Python in the image."""
    namespace: Label = "default"
    """Namespace of the pods."""
    context: Word | None = None
    """Context of kubectl's configuration; the current one if unset."""
    volume_claim: Label
    """PersistentVolumeClaim (ReadWriteMany) that holds the store, and all that the run names."""
    mount_path: str = Field(pattern=SAFE_PATH)
    """Where it is mounted in the pods. The flow must see it at the same path."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    """GPUs of each pod (`nvidia.com/gpu`); none are asked for if unset."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """Cores that each pod requests; none if unset."""
    mem_per_node_gib: int | None = Field(default=None, ge=1)
    """GiB of memory of each pod, requested and at most; no limit if unset."""
    shm_gib: int = Field(default=8, ge=1)
    """GiB of shared memory of each pod (`/dev/shm`); a container's own 64 MB are too few for NCCL."""
    service_account: Label | None = None
    """Service account of the pods; the namespace's default if unset."""
    queue: Label | None = None
    """Queue of Kueue that admits the job (`kueue.x-k8s.io/queue-name`); none if unset."""
    node_selector: dict[Word, Word] = Field(default_factory=dict)
    """Labels that the nodes must have."""
    poll_s: float = Field(default=10.0, gt=0)
    """Seconds between two questions to the cluster."""
