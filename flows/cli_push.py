"""`mcore-flows push`: what an alias points to goes to a hub."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from configs.schema.promote import PUSH_TO, Alias
from flows.children import run_in_terminal
from flows.cli_artifacts import STORE
from flows.cli_artifacts import StoreFolder as Folder
from flows.cli_plan import RUNS
from mcore.artifacts import Store
from mcore.errors import ConfigError, Problem
from mcore.registry.aliases import Registry, models
from mcore.registry.release import release_problems
from tasks.hub_token import hub_token, token_place, token_variable

pushes = typer.Typer()


@pushes.command(rich_help_panel=RUNS)
def push(
    alias: Annotated[Alias, typer.Argument(help="The alias.")],
    to: Annotated[
        str, typer.Option("--to", metavar="hf:ORG/NAME|ms:ORG/NAME", help="The repository; made, private, if need be.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Name in the registry, if it has several models.")
    ] = None,
    secret: Annotated[
        str | None,
        typer.Option(
            "--secret", metavar="BLOCK",
            help="Prefect Secret block with the token; HF_TOKEN or MODELSCOPE_API_TOKEN if not given.",
        ),
    ] = None,
    store: Folder = STORE,
) -> None:  # fmt: skip
    """Upload what an alias points to, with its card, to the Hugging Face hub or ModelScope.

    Every file is read and held against its checksum first. The token is taken from the environment or a Prefect Secret
    block, and is never an argument.
    """
    opened = Store(store)
    found = [model] if model is not None else models(opened)
    problems = []
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        problems.append(Problem("--model", "the name of one", f"the registry has {listed}"))
    else:
        registry = Registry(opened, found[0])
        points_to = registry.points_to(alias)
        if points_to is None:
            problems.append(Problem(f"{alias} of {found[0]}", "a model", "nothing was promoted"))
        else:
            problems += release_problems(opened, registry.release_folder(points_to), fresh=True)
    token = ""
    if re.fullmatch(PUSH_TO, to) is None:
        problems.append(Problem("--to", "hf:org/name or ms:org/name", to))
    elif not (token := hub_token(to, secret)):
        problems.append(Problem(token_place(to, secret), f"a token for {to}", "none"))
    if problems:
        raise ConfigError("nothing was pushed", problems)
    opened.digests.save()
    folder = registry.link(alias).resolve()
    command = [sys.executable, "-m", "mcore.registry", "push", "--folder", folder, "--to", to]
    raise typer.Exit(run_in_terminal(command, {token_variable(to): token}))
