"""`python -m mcore.evaluate run …` (in vLLM's environment) and `python -m mcore.evaluate compare …` (in any)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from mcore.child import run_as_child
from mcore.evaluate.compare import compare_folders, flat_metrics
from mcore.evaluate.report import side_by_side, write_comparison

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@app.command()
def run(
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    suite: Annotated[Path, typer.Option(help="Suite file (configs/suites/*.yaml).")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter that counts on top of MODEL.")] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option(help="Held-out rows, PATH or PATH#N; may be repeated.")
    ] = None,
    method: Annotated[Literal["sft", "pt"], typer.Option(help="Kind of the held-out rows.")] = "sft",
    torch_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: the checkpoint's own.")
    ] = "auto",
    max_model_len: Annotated[int, typer.Option(min=32, help="Tokens: longest prompt and answer together.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens: longest answer.")] = 64,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs to divide the model over.")] = 1,
    model_name: Annotated[str, typer.Option(help="Fills {{NAME}}.")] = "",
    model_author: Annotated[str, typer.Option(help="Fills {{AUTHOR}}.")] = "",
    system: Annotated[str | None, typer.Option(help="System message where cases and rows bring none.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
) -> None:
    """Ask a model every question of a suite, greedily, and measure its perplexity on held-out rows."""
    from mcore.evaluate.engine import EngineSettings
    from mcore.evaluate.run import EvaluationSettings, evaluate

    settings = EvaluationSettings(
        EngineSettings(model, torch_dtype, max_model_len, tensor_parallel_size, adapter=adapter),
        suite,
        tuple(perplexity or ()),
        method,
        max_tokens,
        model_name,
        model_author,
        system,
    )
    typer.echo(json.dumps(evaluate(settings, output, overwrite=overwrite)))


@app.command()
def compare(
    base: Annotated[Path, typer.Option(help="Folder that `run` wrote for the base model.")],
    tuned: Annotated[Path, typer.Option(help="Folder that `run` wrote for the tuned model.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    min_pass_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Gate: smallest fraction of cases that the tuned model passes.")
    ] = None,
    max_regression: Annotated[
        float | None, typer.Option(min=0, max=1, help="Gate: largest loss of pass rate in any group.")
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(min=0, help="Gate: largest perplexity of forgetting sets, in multiples of the base's."),
    ] = None,
    worse_confidence: Annotated[
        float | None,
        typer.Option(min=0.5, max=1, help="Gate: fails if a forgetting group is worse with this confidence."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
) -> None:
    """Compare the tuned model with the base, and hold it against the gates."""
    comparison = compare_folders(
        base,
        tuned,
        min_pass_rate=min_pass_rate,
        max_regression=max_regression,
        max_perplexity_ratio=max_perplexity_ratio,
        worse_confidence=worse_confidence,
    )
    write_comparison(comparison, output, overwrite=overwrite)
    screen = Console(stderr=True)
    if screen.is_terminal:  # the page says the same to those who read a log
        screen.print(side_by_side(comparison))
    typer.echo(json.dumps(flat_metrics(comparison)))
    comparison.raise_failed_gates()


if __name__ == "__main__":
    run_as_child(app)
