"""`mcore-flows`: a whole run, what it would do, and what it left; single stages are in `flows/cli_stages.py`.

Exit status: 0 done, 1 a stage failed, 2 the input is wrong and nothing was started, 3 a gate said no, 75 it was asked
to stop and goes on with the same command, 130 interrupted before there was anything to go on with; 4 of `from-swift`
alone: the run file does not mean all that the command meant. Prefect is imported by `run` alone, so that everything
else starts at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.children import go_on_in_own_session
from flows.cli_artifacts import artifacts
from flows.cli_bootstrap import bootstraps
from flows.cli_chat import chats
from flows.cli_dataset import dataset
from flows.cli_doctor import doctors
from flows.cli_from_swift import translation
from flows.cli_layouts import layout_commands
from flows.cli_node import node_commands
from flows.cli_plan import RUNS, plans
from flows.cli_prepare import prepare_commands
from flows.cli_promote import promotion
from flows.cli_push import pushes
from flows.cli_runs import run_commands
from flows.cli_stages import stages
from flows.run_options import Overrides, RunFile, StoreFolder, all_overrides
from mcore.artifacts import Store
from mcore.child import run_as_child
from mcore.errors import ConfigError, Problem
from mcore.runs import current
from tasks.preflight import check_run_file
from tasks.report import REPORT

app = typer.Typer(
    name="mcore-flows",
    help="Take a Hugging Face checkpoint through Megatron-core and back, with every step proven.",
    epilog="Exit status: 0 done, 1 a stage failed, 2 the input is wrong, 3 a gate said no, 75 asked to stop (the same "
    "command goes on).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command(rich_help_panel=RUNS)
def run(run_file: RunFile, overrides: Overrides = None, store: StoreFolder = None) -> None:
    """Convert, prove, train, export, prove, evaluate; what the store has already is reused.

    Everything that is wrong with the run is told before anything is started. Without a Prefect server (PREFECT_API_URL)
    the run brings its own.
    """
    checked = check_run_file(run_file, all_overrides(overrides, store), here=True)
    go_on_in_own_session()
    from flows.console import run_in_console  # Prefect: more than a second that no other command need wait for

    run_in_console(checked.run)


app.add_typer(plans)
app.add_typer(layout_commands)
app.add_typer(run_commands)
app.add_typer(promotion)
app.add_typer(chats)
app.add_typer(pushes)


@app.command(rich_help_panel=RUNS)
def report(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run.")],
    store: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the artifact store.")] = Path("store"),
    html: Annotated[bool, typer.Option("--html", help="Write its HTML page from the store, and say where.")] = False,
) -> None:
    """Show the page of a run: stages, loss curve, base against tuned, proofs, lineage."""
    if html:
        typer.echo(_html_page(Store(store), name))
        return
    page = store / "runs" / name / REPORT
    if not page.is_file():
        known = sorted(path.parent.name for path in store.glob(f"runs/*/{REPORT}"))
        expected = f"one of {', '.join(known)}" if known else "a run that was started"
        raise ConfigError("there is no such report", [Problem(str(page), expected, "no such file")])
    text = page.read_text()
    if sys.stdout.isatty():
        from rich.markdown import Markdown  # a tenth of a second that only this takes

        Console().print(Markdown(text))
        typer.echo(f"\n{page}")
    else:
        typer.echo(text, nl=False)


def _html_page(store: Store, name: str) -> Path:
    """Write the page of the newest attempt, also of one that is under way or was killed and could write none."""
    from tasks.run_page.page import write_page  # Jinja, which no other command needs

    record = current(store, name)
    if record is None:
        raise ConfigError("there is no such run", [Problem(name, "a run that was started", f"none in {store.root}")])
    return write_page(store, record)


app.add_typer(node_commands)
app.add_typer(translation)
app.add_typer(stages)
app.add_typer(prepare_commands)
app.add_typer(artifacts, name="artifacts", rich_help_panel=RUNS)
app.add_typer(dataset, name="dataset", rich_help_panel=RUNS)
app.add_typer(bootstraps)
app.add_typer(doctors)


def main() -> None:
    """Run the command line; errors are printed once, without a traceback, and become the exit status."""
    run_as_child(app)


if __name__ == "__main__":
    main()
