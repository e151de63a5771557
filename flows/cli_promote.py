"""`mcore-flows promote`, `rollback`, `aliases`, `approve` and `reject`: which model is in use, and since when."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.text import Text

from configs.schema.promote import Alias
from flows.cli_artifacts import STORE, named_artifacts
from flows.cli_artifacts import StoreFolder as Folder
from flows.cli_plan import RUNS, AsJson
from flows.cli_runs import known_run
from flows.tables import plain_table, show
from mcore.artifacts import Store
from mcore.errors import ConfigError, GateError, Problem
from mcore.registry.aliases import ALIASES, Registry, models
from mcore.registry.approval import Answer, Request, answer, questions
from mcore.registry.promotion import promote as promote_model
from mcore.registry.promotion import rollback as roll_back
from mcore.registry.release import release_problems
from mcore.runs import RunRecord, run_names
from mcore.wording import counted, moment

promotion = typer.Typer()

Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="Name in the registry, if it has several models; of promote the run's."
    ),
]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept with the answer.")]
Name = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run that asks.")]


@promotion.command(rich_help_panel=RUNS)
def promote(
    what: Annotated[str, typer.Argument(metavar="RUN|ARTIFACT", help="A run, or export/KEY; a key may be cut short.")],
    to: Annotated[Alias, typer.Option("--to", help="The alias that moves.")],
    model: Model = None,
    because: Annotated[
        str | None,
        typer.Option(
            "--because", metavar="TEXT",
            help="Promote although it is not better than production, or can't be compared; the reason is kept. Gates "
            "can't be passed over.",
        ),
    ] = None,
    store: Folder = STORE,
) -> None:  # fmt: skip
    """Move an alias to a model, if every gate passed and it is better than the one in production.

    Every file of the model, its proofs and its evaluation is read and held against its checksum.
    """
    opened = Store(store)
    if what in run_names(opened):
        record = known_run(opened, what)
        artifacts = {stage.name: stage.artifact for stage in record.stages}
        if "compare" not in artifacts or "export" not in artifacts:
            raise GateError("the model can't be promoted", [Problem(what, "a run with an evaluation", "one without")])
        given = {
            "base_proof": artifacts["verify_convert"],
            "proof": artifacts["verify_export"],
            "comparison": artifacts["compare"],
        }
        artifact, run, name = artifacts["export"], what, model or _model_of(record)
    else:
        ((kind, key),) = named_artifacts(opened, [what])
        artifact, run, given = f"{kind}/{key}", None, {}
        name = model or _only_model(opened)
    decision = promote_model(
        opened, artifact, to, model=name, given=given, run=run, because=because, fresh=True
    )  # fmt: skip
    opened.digests.save()
    if not decision.promoted:
        fix = f"Or promote it all the same: mcore-flows promote {what} --to {to} --because TEXT"
        raise GateError(f"{to} of {name} stays", [Problem(artifact, "a model that is better", decision.reason, fix)])
    typer.echo(f"{to} of {name}: {artifact}, before {decision.before or 'nothing'}\n{decision.reason}")
    typer.echo(f"serve: {Registry(opened, name).link(to)}")


@promotion.command(rich_help_panel=RUNS)
def rollback(
    alias: Annotated[Alias, typer.Argument(help="The alias.")],
    model: Model = None,
    reason: Reason = "asked for",
    store: Folder = STORE,
) -> None:
    """Point an alias at the model before; refused if that is damaged or gone.

    The one that goes is not promoted again by a run, only by `mcore-flows promote`.
    """
    opened = Store(store)
    registry = Registry(opened, model or _only_model(opened))
    after, before = roll_back(opened, registry, alias, reason=reason)
    opened.digests.save()
    typer.echo(f"{alias} of {registry.model}: {after.artifact} again, in place of {before}")
    typer.echo(f"serve: {registry.link(alias)}")


@promotion.command(rich_help_panel=RUNS)
def aliases(
    model: Model = None,
    history: Annotated[bool, typer.Option("--history", help="Every move, oldest first.")] = False,
    as_json: AsJson = False,
    store: Folder = STORE,
) -> None:
    """List what is candidate, staging and production, and the paths to serve; with --history every move of them."""
    opened = Store(store)
    registries = [Registry(opened, name) for name in ([model] if model is not None else models(opened))]
    if as_json:
        typer.echo(json.dumps([_as_json(registry) for registry in registries], indent=2))
        return
    if history:
        table = plain_table("model", "when (UTC)", "alias", "", "artifact", "by", "reason")
        for registry in registries:
            for move in registry.history():
                table.add_row(
                    registry.model,
                    moment(move.time),
                    move.alias,
                    move.action,
                    move.artifact,
                    move.by,
                    Text(move.reason),
                )
        show(table)
        return
    table = plain_table("model", "alias", "artifact", "since (UTC)", "", "serve")
    for registry in registries:
        for row in _rows(registry):
            note = "damaged: `rollback`, or run its run again" if row["problems"] else ""
            table.add_row(
                registry.model, row["alias"], row["artifact"], moment(row["since"]), Text(note), Text(row["path"])
            )
    show(table)
    for registry in registries:
        for request in questions(registry):
            if request.is_open:
                typer.echo(f"\n{request.run} asks whether {request.alias} may move to {request.artifact}: "
                           f"{request.summary}\nmcore-flows approve {request.run}, or reject, until "
                           f"{moment(request.until)} UTC")  # fmt: skip
    typer.echo(counted(len(registries), "model"))


@promotion.command(rich_help_panel=RUNS)
def approve(name: Name, reason: Reason = "", store: Folder = STORE) -> None:
    """Agree to the promotion that a run asks for."""
    _answer(Store(store), name, "approved", reason)


@promotion.command(rich_help_panel=RUNS)
def reject(name: Name, reason: Reason = "", store: Folder = STORE) -> None:
    """Refuse the promotion that a run asks for."""
    _answer(Store(store), name, "rejected", reason)


def _answer(store: Store, name: str, said: Answer, reason: str) -> None:
    record = known_run(store, name)
    keys = {stage.name: stage.key for stage in record.stages}
    if "promote" not in keys:
        raise ConfigError("there is nothing to answer", [Problem(name, "a run with promote.approval", "none")])
    request = answer(Registry(store, _model_of(record)), keys["promote"], said, reason=reason)
    typer.echo(f"{request.alias}: {request.artifact} is {said}")
    if request.flow_run is not None:
        _resume(request, said, reason)


def _resume(request: Request, said: Answer, reason: str) -> None:
    """Let a suspended flow run go on. The answer is kept whether the server is there or not."""
    from prefect.exceptions import PrefectException  # more than a second that no other command need wait for
    from prefect.flow_runs import resume_flow_run

    word = {"approved": "approve", "rejected": "reject"}[said]
    try:
        resume_flow_run(UUID(request.flow_run), run_input={"answer": word, "reason": reason})
    except (PrefectException, OSError, RuntimeError, ValueError) as exc:
        typer.echo(f"the flow run could not be resumed ({exc}); resume it in the UI, or start the run again", err=True)
    else:
        typer.echo("the flow run goes on")


def _model_of(record: RunRecord) -> str:
    """Name that the registry knows the model of a run by."""
    return (record.config.get("promote") or {}).get("model") or record.name


def _only_model(store: Store) -> str:
    found = models(store)
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise ConfigError("which model?", [Problem("--model", "the name of one", f"the registry has {listed}")])
    return found[0]


def _rows(registry: Registry) -> list[dict[str, Any]]:
    rows = []
    moves = registry.history()
    for alias in ALIASES:
        name = registry.points_to(alias)
        if name is None:
            continue
        folder = registry.release_folder(name)
        last = next((move for move in reversed(moves) if move.alias == alias), None)
        problems = [str(problem) for problem in release_problems(registry.store, folder)]
        rows.append(
            {
                "alias": alias,
                "artifact": last.artifact if last is not None else "",
                "since": last.time if last is not None else "",
                "path": str(registry.link(alias)),
                "release": str(folder),
                "problems": problems,
            }
        )
    return rows


def _as_json(registry: Registry) -> dict[str, Any]:
    return {
        "model": registry.model,
        "aliases": _rows(registry),
        "history": [asdict(move) for move in registry.history()],
        "questions": [asdict(request) for request in questions(registry)],
    }
