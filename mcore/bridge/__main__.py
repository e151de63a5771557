"""`python -m mcore.bridge`: convert a Hugging Face folder to a megatron-core checkpoint, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from mcore.child import run_as_child
from mcore.folders import refuse_missing

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Output = Annotated[Path, typer.Option(help="Folder to make; it appears whole or not at all.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that divide the work.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")]


@app.command()
def convert(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder with safetensors.")],
    output: Output,
    make_vocab_size_divisible_by: Annotated[
        int, typer.Option(min=1, help="Pad the vocabulary with zero rows to a multiple of this.")
    ] = 128,
    source: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What HF is, for the metrics of the checkpoint.")
    ] = None,
    workers: Workers = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be written, and how long it would take.")
    ] = False,
    disk_gb_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="Disk speed that a dry run goes by; measured if not given.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Hugging Face folder to megatron-core checkpoint (torch_dist)."""
    if dry_run:
        from mcore.bridge.dry_run import dry_run as lines

        options = {"make_vocab_size_divisible_by": make_vocab_size_divisible_by, "disk_gb_per_s": disk_gb_per_s}
        for line in lines(hf, output, **options):  # type: ignore[arg-type]
            typer.echo(line)
        return
    from mcore.bridge.convert import convert as run  # torch and megatron: seconds that --help need not wait for

    metrics = run(
        hf,
        output,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        source=source,
        num_workers=workers,
        overwrite=overwrite,
    )
    typer.echo(json.dumps(metrics))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder, with the tracker or one iteration in it.")],
    output: Output,
    hf: Annotated[
        Path | None, typer.Option(help="Folder with the base model's config and tokenizer; CHECKPOINT/hf if not given.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Checkpoint folder that a LoRA run started from.")] = None,
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora/--no-merge-lora", help="Of a LoRA run: merged weights, or the adapter.")
    ] = True,
    iteration: Annotated[int | None, typer.Option(help="Iteration; the newest complete one if not given.")] = None,
    torch_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Dtype of the written weights.")
    ] = "auto",
    max_shard_size_gb: Annotated[float, typer.Option(min=0.001, help="Largest file, in 10^9 bytes.")] = 5.0,
    system: Annotated[
        str | None, typer.Option(help="System message that the chat template puts before conversations without one.")
    ] = None,
    enable_thinking: Annotated[
        bool | None, typer.Option(help="What the chat template takes enable_thinking for where a request has none.")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="Jinja file in place of the tokenizer's chat template.")] = None,
    workers: Workers = 1,
    overwrite: Overwrite = False,
) -> None:
    """megatron-core checkpoint (torch_dist) to Hugging Face folder."""
    named = {"hf": hf, "base": base}
    refuse_missing(checkpoint=checkpoint, **{name: folder for name, folder in named.items() if folder is not None})
    from mcore.bridge.export import export as run
    from mcore.data.chat.options import read_template
    from mcore.data.chat.served import Served

    metrics = run(
        checkpoint,
        output,
        hf=hf,
        base=base,
        merge_lora=merge_lora,
        iteration=iteration,
        torch_dtype=torch_dtype,
        max_shard_size_gb=max_shard_size_gb,
        num_workers=workers,
        served=Served(system, enable_thinking, None if template is None else read_template(template)),
        overwrite=overwrite,
    )
    typer.echo(json.dumps(metrics))


if __name__ == "__main__":
    run_as_child(app)
