"""One machine's share of a job: torchrun, under a supervisor of its own.

The processes of all machines find each other by torchrun's c10d rendezvous on the first one. Who is first, and where,
is told by whoever started this: an argument, Slurm, an indexed job of Kubernetes, or its training operator.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from mcore.child import ERROR_FILE_VARIABLE
from mcore.errors import ConfigError, InfrastructureError, Problem, error_from_json
from mcore.launchers.orders import Orders
from mcore.supervise.record import read_record
from mcore.supervise.supervisor import Orders as SupervisorOrders
from mcore.supervise.supervisor import Supervisor

PORT_RANGE = (20000, 10000)
"""First port, and number of ports, of Slurm's jobs: two on one machine get different ones, below those of clients."""
KUBERNETES_PORT = 29400
START_VARIABLE = "MCORE_FLOWS_START"
"""Environment variable that says to a pod which start of the job it belongs to."""
READ_TIMEOUT_S = 60
"""Seconds to wait for an answer of the first machine's store. Who is cut off from it gives up by this only as long as
the rendezvous goes on: torch 2.13 then waits for the rest of an answer without end, and the stall limit has to do."""
PROBE_S = 3.0
UNREACHABLE = "unreachable-"
"""How the file begins in which a machine says that it no longer reaches the first one."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the machines this is.

    Attributes:
        rank: Its number; 0 is the one that the others find.
        endpoint: `host:port` of number 0.
        start: The start of the job that it belongs to.
    """

    rank: int
    endpoint: str
    start: str


def place_of(
    orders: Orders, environment: Mapping[str, str], *, rank: int | None = None, start: str | None = None
) -> Place:
    """This machine's place, told by arguments or by its launcher's environment variables.

    Raises:
        ConfigError: Nobody tells.
    """
    if orders.launcher == "slurm":
        return _place_in_slurm(orders, environment)
    if orders.launcher == "kubernetes" and orders.kubernetes is not None:
        is_indexed = orders.kubernetes.kind == "jobset"
        number = environment.get("JOB_COMPLETION_INDEX" if is_indexed else "RANK", "")
        host = f"{orders.name}-node-0-0.{orders.name}" if is_indexed else environment.get("MASTER_ADDR", "")
        port = KUBERNETES_PORT if is_indexed else environment.get("MASTER_PORT", "")
        return Place(_number(number, orders), f"{host}:{port}", environment.get(START_VARIABLE, ""))
    if orders.rdzv_endpoint is None or start is None:
        problems = [Problem("launch.rdzv_endpoint and the start", "both", f"{orders.rdzv_endpoint}, {start}")]
        raise ConfigError("nobody says which job this machine belongs to", problems)
    return Place(_number(str(rank), orders), orders.rdzv_endpoint, start)


def _place_in_slurm(orders: Orders, environment: Mapping[str, str]) -> Place:
    job = environment.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        raise ConfigError("this is no task of a Slurm job", [Problem("SLURM_JOB_ID", "a number", job or "nothing")])
    asked = ["scontrol", "show", "hostnames", environment.get("SLURM_JOB_NODELIST", "")]
    hosts = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    port = PORT_RANGE[0] + int(job) % PORT_RANGE[1]
    start = f"{job}.{environment.get('SLURM_RESTART_COUNT') or 0}"
    return Place(_number(environment.get("SLURM_NODEID", ""), orders), f"{hosts[0]}:{port}", start)


def _number(text: str, orders: Orders) -> int:
    if not text.isdigit() or int(text) >= orders.nnodes:
        expected = f"from 0 to {orders.nnodes - 1} (launch.nnodes: {orders.nnodes})"
        raise ConfigError("this machine has no place in the job", [Problem("its number", expected, text or "none")])
    return int(text)


def torchrun_words(orders: Orders, place: Place, *, local_addr: str | None) -> list[str]:
    """The command of a machine."""
    settings = {
        "is_host": "true" if place.rank == 0 else "false",
        "join_timeout": round(orders.join_timeout_s),
        "read_timeout": READ_TIMEOUT_S,
    }
    options = [
        f"--nnodes={orders.nnodes}",
        f"--nproc-per-node={orders.nproc_per_node}",
        f"--node-rank={place.rank}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={place.endpoint}",
        f"--rdzv-id={orders.name}.{place.start}",
        f"--rdzv-conf={','.join(f'{name}={value}' for name, value in settings.items())}",
        "--max-restarts=0",
        f"--log-dir={orders.start_folder(place.start) / f'torchrun-{place.rank}'}",
        *([f"--local-addr={local_addr}"] if local_addr is not None else []),
    ]
    return [orders.python, "-m", "torch.distributed.run", *options, *orders.command]


def address_towards(endpoint: str, ifname: str | None) -> str | None:
    """The address by which other machines reach this one; None if only its name may tell.

    Args:
        endpoint: `host:port` of the first machine.
        ifname: Interface that is to be used, if one is named.

    Raises:
        ConfigError: There is no such interface, or it has no address.
    """
    if ifname is not None:
        of_all = psutil.net_if_addrs()
        found = [one.address for one in of_all.get(ifname, []) if one.family == socket.AF_INET]
        if not found:
            known = ", ".join(sorted(of_all))
            raise ConfigError("the processes can't talk", [Problem("launch.socket_ifname", f"one of {known}", ifname)])
        return found[0]
    host, _, port = endpoint.rpartition(":")
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # asks the routing table; nothing is sent
        address = str(probe.getsockname()[0])
        # A name that leads to this machine itself, as many a hosts file has it, leads nobody else here.
        return None if address.startswith("127.") and not host.startswith("127.") else address
    return None


def work(orders: Orders, place: Place) -> int:
    """Run this machine's share to its end.

    Returns:
        0 when the job is complete, 75 if it was asked to stop, saved and left, else another exit status. What went
        wrong is in `error.json` of the start's folder, told by whoever failed first.
    """
    folder = orders.start_folder(place.start)
    folder.mkdir(parents=True, exist_ok=True)
    error_file, log = folder / "error.json", folder / f"node-{place.rank}.log"
    words = torchrun_words(orders, place, local_addr=address_towards(place.endpoint, orders.socket_ifname))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.environ.update(environment_of_processes(orders, error_file))
    record = folder / f"node-{place.rank}.json"
    status = Supervisor(
        SupervisorOrders(
            parent=os.getppid(),
            grace_s=orders.grace_s,
            record=record,
            stall_timeout_s=orders.stall_timeout_s,
            progress=orders.progress,
            stacks=folder / f"stacks-{place.rank}",
            log=str(log),
        )
    ).work(words)
    _tell_of_stalling(orders, place, record, error_file, log)
    with suppress(OSError, ValueError):
        return error_from_json(error_file.read_text()).exit_status if status else 0
    return status


def environment_of_processes(orders: Orders, error_file: Path) -> dict[str, str]:
    """What torchrun's processes find in their environment beside what is there."""
    num_cores = len(os.sched_getaffinity(0))
    found = {
        ERROR_FILE_VARIABLE: str(error_file),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores // orders.nproc_per_node)),
        # torchrun has to be through with its ranks when its own grace ends.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, int(orders.grace_s - min(10, orders.grace_s / 4)))),
    }
    if orders.socket_ifname is not None:
        found |= {"GLOO_SOCKET_IFNAME": orders.socket_ifname, "NCCL_SOCKET_IFNAME": orders.socket_ifname}
    return found


def why_unreachable(endpoint: str) -> str:
    """Why a host does not answer; empty if it does. One where nothing listens any more answers all the same."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except ConnectionRefusedError:
        return ""
    except OSError as exc:
        return str(exc)
    return ""


def _tell_of_stalling(orders: Orders, place: Place, record_file: Path, error_file: Path, log: Path) -> None:
    """Write the error document of a machine whose processes stood still; they can't."""
    record = read_record(record_file)
    if record is None or record.cause != "stalled":
        return
    if place.rank and (why := why_unreachable(place.endpoint)):
        told = f"machine {place.rank} ({record.host}) does not reach machine 0 at {place.endpoint}: {why}"
        error_file.with_name(f"{UNREACHABLE}{place.rank}").write_text(told)
    stacks = [Problem(record.stacks, fix="Where each of its processes stood.")] if record.stacks else []
    error = InfrastructureError(
        f"machine {place.rank} ({record.host}) stood still for {orders.stall_timeout_s:g} s and was ended",
        stacks,
        returncode=record.status,
        log_path=log,
    )
    with suppress(OSError):
        temporary = error_file.with_name(f"{error_file.name}.{os.getpid()}.{place.rank}")
        temporary.write_text(error.to_json())
        with suppress(FileExistsError):
            error_file.hardlink_to(temporary)
        temporary.unlink()
