"""What a Prefect server needs for this project: work pool, limit of GPUs, deployments of `prefect.yaml`, automations.

Everything is compared with what is there first, and only what is missing or other is written. So it can be called at
every start of a machine, and what it says it changed has changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events import AutomationCore, DeploymentTriggerTypes
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker
from pydantic import TypeAdapter

from flows.automations import failed_gates, zombies
from mcore.devices import installed_gpus
from mcore.errors import ConfigError, PipelineError, Problem

CHECKOUT = Path(__file__).parents[1]
LIMIT = "gpu"
"""Name of the concurrency limit that stages with GPUs take slots of."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that the server has to have, and what was other; `changes` is empty if it is there as it should be."""

    what: str
    name: str
    changes: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is told by the command line.

    Attributes:
        gpus: Slots of the limit; what this machine has if None, and an existing limit stays.
        notify: Notification block, `type/name`; an automation that has one keeps it if None.
        silent_s: Seconds without heartbeat after which a run has crashed.
    """

    gpus: int | None = None
    notify: str | None = None
    silent_s: float = 540.0


def bootstrap(client: SyncPrefectClient, wanted: Wanted, *, dry_run: bool) -> Iterator[Step]:
    """Bring the server to what `prefect.yaml` and the options say, a step at a time.

    Args:
        client: The server's.
        wanted: The options.
        dry_run: Write nothing.

    Raises:
        ConfigError: There is no such notification block; nothing was written.
        PipelineError: Prefect can't make a deployment.
    """
    project = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())
    block = _block(client, wanted.notify)
    for name in sorted({entry["work_pool"]["name"] for entry in project["deployments"]}):
        yield _work_pool(client, name, dry_run=dry_run)
    yield _gpu_limit(client, wanted.gpus, dry_run=dry_run)
    for entry in project["deployments"]:
        yield _deployment(client, project, entry, dry_run=dry_run)
    yield _automation(client, zombies(wanted.silent_s), dry_run=dry_run)
    yield _automation(client, failed_gates(block), dry_run=dry_run, keep_actions=block is None)


def _block(client: SyncPrefectClient, name: str | None) -> UUID | None:
    if name is None:
        return None
    block_type, _, document = name.partition("/")
    try:
        return client.read_block_document_by_name(document, block_type).id
    except ObjectNotFound as exc:
        fix = "Make one in the UI (Blocks), such as slack-webhook/ops, and name it type/name."
        raise ConfigError("nobody can be notified", [Problem(name, "a notification block", "none", fix)]) from exc


def _work_pool(client: SyncPrefectClient, name: str, *, dry_run: bool) -> Step:
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        if not dry_run:
            template = ProcessWorker.get_default_base_job_template()
            client.create_work_pool(WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template))
        return Step("work pool", name, ("missing",), ProcessWorker.type)
    return Step("work pool", name, note=pool.type)  # of whatever type: it is the owner's to choose


def _gpu_limit(client: SyncPrefectClient, gpus: int | None, *, dry_run: bool) -> Step:
    try:
        now = client.read_global_concurrency_limit_by_name(LIMIT).limit
    except ObjectNotFound:
        now = None
    if now is not None and gpus in (None, now):
        return Step("concurrency limit", LIMIT, note=f"{now} slots")
    wanted = gpus or len(installed_gpus()) or os.cpu_count() or 1  # without GPUs, slots are counted
    if not dry_run:
        client.upsert_global_concurrency_limit_by_name(LIMIT, wanted)
    change = "missing" if now is None else f"slots {now} -> {wanted}"
    return Step("concurrency limit", LIMIT, (change,), f"{wanted} slots")


def _deployment(
    client: SyncPrefectClient, project: Mapping[str, Any], entry: Mapping[str, Any], *, dry_run: bool
) -> Step:
    flow: Flow[..., Any] = load_flow_from_entrypoint(str(CHECKOUT / entry["entrypoint"]))
    name = f"{flow.name}/{entry['name']}"
    wanted = _wanted(project, entry) | {"form of the run": _form(parameter_schema(flow).model_dump(mode="json"))}
    changes = _changes(client, name, entry, wanted)
    if changes and not dry_run:
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--name", name]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
        if done.returncode:
            raise PipelineError(f"the deployment {name} can't be made", [(done.stderr or done.stdout).strip()])
        left = _changes(client, name, entry, wanted)
        if left:
            raise PipelineError(f"the deployment {name} is not what prefect.yaml says", list(left))
    return Step("deployment", name, changes)


def _changes(
    client: SyncPrefectClient, name: str, entry: Mapping[str, Any], wanted: Mapping[str, Any]
) -> tuple[str, ...]:
    """What of a deployment is other on the server than in `prefect.yaml`, in words."""
    try:
        deployment = client.read_deployment_by_name(name)
    except ObjectNotFound:
        return ("missing",)
    found = _found(deployment)
    changes = [what for what in wanted if wanted[what] != found[what]]
    related = {automation["name"]: automation for automation in _related(client, deployment.id)}
    for trigger in _triggers(entry):
        trigger.set_deployment_id(deployment.id)
        automation = trigger.as_automation()
        if automation.name not in related or _other(automation, related[automation.name]):
            changes.append(f"trigger {automation.name!r}")
    return tuple(changes)


def _wanted(project: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    limit = entry.get("concurrency_limit", {})
    return {
        "description": entry["description"],
        "entrypoint": entry["entrypoint"],
        "tags": sorted(entry["tags"]),
        "parameters": entry["parameters"],
        "pull steps": project["pull"],
        "work pool": entry["work_pool"]["name"],
        "job variables": entry["work_pool"].get("job_variables", {}),
        "schedules": sorted((one["slug"], one["cron"], one["timezone"]) for one in entry.get("schedules", [])),
        "concurrency": (limit.get("limit"), limit.get("collision_strategy")),
    }


def _found(deployment: DeploymentResponse) -> dict[str, Any]:
    """The same of what is on the server. Whether a schedule is paused there is left to whoever paused it."""
    limit, options = deployment.global_concurrency_limit, deployment.concurrency_options
    schedules = [one.model_dump(mode="json") for one in deployment.schedules]
    return {
        "description": deployment.description,
        "entrypoint": deployment.entrypoint,
        "tags": sorted(deployment.tags),
        "parameters": deployment.parameters,
        "pull steps": deployment.pull_steps,
        "work pool": deployment.work_pool_name,
        "job variables": deployment.job_variables,
        "schedules": sorted(
            (one["slug"], one["schedule"].get("cron"), one["schedule"].get("timezone")) for one in schedules
        ),
        "concurrency": (limit and limit.limit, options and options.collision_strategy.value),
        "form of the run": _form(deployment.parameter_openapi_schema or {}),
    }


def _form(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A form without its empty parts, which the server leaves out."""
    return {name: part for name, part in schema.items() if part}


def _triggers(entry: Mapping[str, Any]) -> list[Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(DeploymentTriggerTypes)
    return [adapter.validate_python(dict(trigger)) for trigger in entry.get("triggers", [])]


def _related(client: SyncPrefectClient, deployment: UUID) -> list[dict[str, Any]]:
    """Automations that have to do with a deployment: its triggers, and what others made for it."""
    owner = {"resource_id": f"prefect.deployment.{deployment}"}
    answer = client.request("GET", "/automations/related-to/{resource_id}", path_params=owner)
    found: list[dict[str, Any]] = answer.json()
    return found


def _automation(
    client: SyncPrefectClient, wanted: AutomationCore, *, dry_run: bool, keep_actions: bool = False
) -> Step:
    named = client.read_automations_by_name(wanted.name)
    if not named:
        if not dry_run:
            client.create_automation(wanted)
        return Step("automation", wanted.name, ("missing",))
    found = named[0].model_dump(mode="json")
    if keep_actions:
        wanted = wanted.model_copy(update={"actions": named[0].actions})
    changes = _other(wanted, found)
    if changes and not dry_run:
        client.update_automation(named[0].id, wanted)
    return Step("automation", wanted.name, changes)


def _other(wanted: AutomationCore, found: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of an automation that are other on the server. Whether it is paused there is left to whoever paused it."""
    told = AutomationCore.model_validate({name: found[name] for name in AutomationCore.model_fields if name in found})
    return tuple(
        name
        for name in ("description", "trigger", "actions")
        if wanted.model_dump(mode="json")[name] != told.model_dump(mode="json")[name]
    )
