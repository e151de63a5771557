"""`python -m mcore.verify.mutants`: test the gate with wrong conversions, and write the card about it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from mcore.child import run_as_child
from mcore.errors import PrecisionError, Problem
from mcore.folders import whole_folder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def mutants(
    output: Annotated[Path, typer.Option(help="Folder for mutants.json and mutants.md.")],
    num_seeds: Annotated[int, typer.Option(min=1, help="Healthy models of each kind.")] = 5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
) -> None:
    """Run all mutants and the healthy models. Exit status 3 if one survives, or a healthy model is stopped."""
    from mcore.verify.mutants.card import to_markdown
    from mcore.verify.mutants.catalogue import MUTANTS
    from mcore.verify.mutants.run import Results, run_healthy, run_mutants

    start = time.monotonic()
    with whole_folder(output, overwrite=overwrite) as folder, tempfile.TemporaryDirectory() as scratch:
        wrong = run_mutants(MUTANTS, Path(scratch))
        healthy = run_healthy(num_seeds, Path(scratch) / "healthy")
        results = Results(mutants=tuple(wrong), healthy=tuple(healthy))
        (folder / "mutants.json").write_text(results.model_dump_json(indent=2) + "\n")
        card = to_markdown(wrong, healthy, time.monotonic() - start)
        (folder / "mutants.md").write_text(card)
    typer.echo(card)
    problems = [Problem(v.name, "to be stopped", f"error {v.relative_error:.1e}") for v in wrong if v.numerical_passed]
    problems += [
        Problem(v.name, "to pass both proofs", f"error {v.relative_error:.1e}")
        for v in healthy
        if not (v.numerical_passed and v.structural_passed)
    ]
    if problems:
        raise PrecisionError("the gate does not tell wrong conversions from right ones", problems)


if __name__ == "__main__":
    run_as_child(app)
