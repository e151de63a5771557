"""What all stages share: look the artifact up, or make it in a child process and commit it.

A stage is a function that makes one artifact in `job.output`. `@stage(name)` turns it into a Prefect task:

    @stage("convert")
    def convert(job: Job, *, hf: ArtifactRef) -> None:
        job.python("mcore.bridge", "convert", "--hf", hf.path, "--output", job.output, …)

In a flow it is called with the planned run and its inputs, `convert(planned, hf=source)`, and returns a reference to
the artifact. The store is the truth, so Prefect's own cache is off; what the store has is reused, as a state named
Cached. Tasks are called directly, never submitted: a submitted task does not see that its run is cancelled.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import task_run as current_task_run
from prefect.states import Completed
from prefect.tasks import exponential_backoff

from configs.schema.run import RunConfig
from mcore import launch
from mcore.artifacts import ArtifactRef, Store
from mcore.errors import GateError, LaunchError, PipelineError
from mcore.folders import remove
from mcore.leases import Lease
from tasks.attach import start_or_attach
from tasks.devices import deployment_slots
from tasks.events import tell_gate_failed
from tasks.failure import FAILURE, record_failure
from tasks.graph import StagePlan
from tasks.preflight.devices import request_of
from tasks.versions import versions_of
from tasks.watch import watched

P = ParamSpec("P")

LOG = "stage.log"
ERROR = "error.json"
METRICS = "metrics.json"
RETRY_JITTER = 0.5
"""Share of the delay that a retry comes later, at most: what failed together shall not come back together."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage went: reused or run, and how long it took in this run."""

    name: str
    artifact: ArtifactRef
    cached: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run and all that follows from it before anything is started.

    Attributes:
        run: The run.
        store: Where its artifacts are.
        plans: Its stages by name.
        local_model: The base model, if it is a folder of the user's own; else it has to be fetched.
        outcomes: Filled while it runs, a stage at a time.
    """

    run: RunConfig
    store: Store
    plans: Mapping[str, StagePlan]
    local_model: ArtifactRef | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    def stage_dir(self, name: str) -> Path:
        """Log of a stage in this run, and the report of a gate that said no."""
        return self.store.run_dir(self.run.name) / name


@dataclass(frozen=True, slots=True)
class Job:
    """One execution of a stage.

    Attributes:
        run: The run.
        name: The stage.
        ingredients: What the artifact's key was made of.
        output: The folder to make. A stage that goes on from what an earlier attempt left finds that here.
        stage_dir: Where the log goes.
        lease: The right to make it, under which its processes work.
        interpreter: Python of the environment that the stage runs in.
        say: Takes a line for the flow's log.
        begin_s: When it began (`time.monotonic`), which its time limit is counted from.
    """

    run: RunConfig
    name: str
    ingredients: Mapping[str, Any]
    output: Path
    stage_dir: Path
    lease: Lease | None
    interpreter: str
    say: Callable[[str], None]
    begin_s: float = field(default_factory=time.monotonic)

    def python(self, module: str, *arguments: str | Path | float, **options: Any) -> None:
        """Run `python -m module arguments` to its end; options as in `mcore.launch.run`."""
        self.launch([self.interpreter, "-m", module, *map(str, arguments)], **options)

    def launch(self, argv: list[str], **options: Any) -> None:
        """Run a command to its end; options as in `mcore.launch.run`, and `num_devices`, which it waits for.

        Raises:
            PipelineError: As there; a `LaunchError` also if the stage's time was up before.
            Abort: The flow run was cancelled or deleted, and nobody had ended it.
        """
        limit_s = self.run.launch.timeout_of(self.name)
        left_s = None if limit_s is None else self.begin_s + limit_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise LaunchError(f"{self.name} took longer than {limit_s:g} s")
        on_tick = options.pop("on_tick", None)
        num_devices = options.pop("num_devices", 0)
        if num_devices:
            options["devices"] = request_of(self.run.launch, num_devices, f"run {self.run.name}, {self.name}")
        with ExitStack() as held:
            watch = held.enter_context(watched())

            def tick() -> None:
                if watch is not None:
                    watch.check()
                if on_tick is not None:
                    on_tick()

            # Whoever goes on with the command of a killed run has no slots: those were that run's.
            if num_devices and (self.lease is None or self.lease.adopted is None):
                check = watch.check if watch is not None else (lambda: None)
                held.enter_context(deployment_slots(options["devices"], self.say, check))
            launch.run(
                argv,
                log_path=self.stage_dir / LOG,
                error_file=self.stage_dir / ERROR,
                timeout_s=left_s,
                lease=self.lease,
                reattach_s=self.run.launch.reattach_s,
                on_line=self.say,
                on_tick=tick,
                **options,
            )


def stage(
    name: str, *, interpreter: Callable[[RunConfig], str] = lambda run: sys.executable
) -> Callable[[Callable[Concatenate[Job, P], None]], Callable[Concatenate[PlannedRun, P], ArtifactRef]]:
    """Make a Prefect task of a function that makes an artifact.

    Args:
        name: The stage's name in `tasks/graph.py`.
        interpreter: Python that its commands run in, if not this one.
    """

    def decorate(make: Callable[Concatenate[Job, P], None]) -> Callable[Concatenate[PlannedRun, P], ArtifactRef]:
        @task(name=name, description=make.__doc__, cache_policy=NO_CACHE, persist_result=False)
        def run_stage(planned: PlannedRun, inputs: Mapping[str, ArtifactRef]) -> Any:
            return _reuse_or_make(planned, planned.plans[name], make, inputs, interpreter(planned.run))

        def call(planned: PlannedRun, /, *args: P.args, **inputs: P.kwargs) -> ArtifactRef:
            return _call(run_stage, planned, planned.plans[name], inputs)

        call.__name__, call.__doc__ = make.__name__, make.__doc__
        return call

    return decorate


def _call(run_stage: Task[..., Any], planned: PlannedRun, plan: StagePlan, inputs: Mapping[str, Any]) -> ArtifactRef:
    given = {role: f"{ref.kind}/{ref.key}" for role, ref in inputs.items()}
    assert given == plan.inputs, f"the flow hands {plan.name} other inputs than the graph says: {given}, {plan.inputs}"
    limits = planned.run.launch
    begin = time.monotonic()
    state: State[ArtifactRef] = run_stage.with_options(  # type: ignore[assignment]
        retries=limits.retries,
        retry_delay_seconds=exponential_backoff(limits.retry_delay_s),
        retry_jitter_factor=RETRY_JITTER,
        retry_condition_fn=is_worth_a_retry,
    )(planned, inputs, return_state=True)
    artifact = state.result()
    outcome = Outcome(plan.name, artifact, state.name == "Cached", time.monotonic() - begin)
    planned.outcomes.append(outcome)
    get_run_logger().info("%s: %s in %.1f s", plan.name, "cached" if outcome.cached else "done", outcome.seconds)
    return artifact


def is_worth_a_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Only what was lost for a reason outside the work is started again; never a failed gate or a wrong input."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, PipelineError) and error.is_transient


def _reuse_or_make(
    planned: PlannedRun,
    plan: StagePlan,
    make: Callable[..., None],
    inputs: Mapping[str, ArtifactRef],
    interpreter: str,
) -> State[ArtifactRef] | ArtifactRef:
    logger, store, stage_dir = get_run_logger(), planned.store, planned.stage_dir(plan.name)
    attempt = current_task_run.run_count or 1
    with start_or_attach(planned, plan, logger.info) as lease:
        status = store.status(plan.kind, plan.key)
        # An input that was lost and made again may have come out otherwise: training on a GPU does. Proofs say nothing
        # about content.
        content = {role: ref.content for role, ref in inputs.items() if role in plan.ingredients["inputs"]}
        outdated = status.manifest.outdated_inputs(content) if status.manifest else []
        if outdated:
            logger.warning("%s is made again: its input %s is another now", plan.artifact, ", ".join(outdated))
        elif status.manifest is not None:
            if (stage_dir / ERROR).exists():
                remove(stage_dir)  # a failure of this name with other settings says nothing about what is reused
            return Completed(name="Cached", message=f"{plan.artifact} is reused", data=store.ref(status.manifest))
        if status.state == "damaged":
            logger.warning("%s is damaged and made again: %s", plan.artifact, status.why)
        logger.info("%s: started%s", plan.name, "" if attempt == 1 else f" again, attempt {attempt}")
        if attempt == 1 and lease.adopted is None:
            remove(stage_dir)  # what an earlier run of this name left
        stage_dir.mkdir(parents=True, exist_ok=True)
        job = Job(
            run=planned.run,
            name=plan.name,
            ingredients=plan.ingredients,
            output=store.partial(plan.kind, plan.key),
            stage_dir=stage_dir,
            lease=lease,
            interpreter=interpreter,
            say=logger.info,
        )
        versions = versions_of(interpreter)
        begin = time.monotonic()
        try:
            make(job, **inputs)
        except PipelineError as error:
            if isinstance(error, GateError):
                _keep_report(job)
                tell_gate_failed(planned.run.name, plan.name, plan.artifact, error)
            failure = record_failure(error, planned.run, stage=plan.name, attempt=attempt, log=stage_dir / LOG)
            logger.info("%s: %s failure, digest in %s", plan.name, failure.kind, stage_dir / FAILURE)
            raise
        with suppress(OSError):  # a stage that needed no process left no log
            stage_dir.rmdir()
        return store.commit(
            plan.kind,
            plan.key,
            inputs=plan.inputs,
            input_content=content,
            ingredients=plan.ingredients,
            metrics=_figures(job.output),
            versions=versions,
            duration_s=time.monotonic() - begin,
            lease=lease,
        )


def _figures(output: Path) -> dict[str, Any]:
    """What the stage's command wrote of itself into `metrics.json`."""
    file = output / METRICS
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return figures


def _keep_report(job: Job) -> None:
    """A gate said no: nothing is committed, but what it found is kept in the run's folder."""
    if job.output.is_dir():
        shutil.copytree(job.output, job.stage_dir, dirs_exist_ok=True)
        remove(job.output)
