"""`python -m mcore.verify`: prove that a Hugging Face folder and a megatron-core checkpoint are the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mcore.child import run_as_child
from mcore.folders import refuse_missing

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def verify(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    mcore: Annotated[Path, typer.Option(help="Checkpoint folder, with the tracker and hf/ in it.")],
    output: Annotated[Path, typer.Option(help="Folder of the report; appears whole, whatever the verdict.")],
    base: Annotated[Path | None, typer.Option(help="Checkpoint folder that a LoRA run started from.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter that counts on top of HF, if not merged.")] = None,
    iteration: Annotated[int | None, typer.Option(help="Iteration; the newest complete one if not given.")] = None,
    max_relative_error: Annotated[
        float, typer.Option(min=0.0, help="Largest difference of logits that passes, in their standard deviations.")
    ] = 1e-4,
    num_prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 4,
    max_prompt_tokens: Annotated[int, typer.Option(min=8, help="Tokens of the longest prompt.")] = 96,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Compare noise in this dtype too; auto: that of the weights, float32: don't."),
    ] = "auto",
    max_noise_ratio: Annotated[
        float, typer.Option(min=0.0, help="Noise of megatron-core that passes, in multiples of transformers' noise.")
    ] = 1.25,
    against_peers: Annotated[
        bool, typer.Option("--against-peers", help="Say in the report what other tools' rules would have said.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
) -> None:
    """Compare bits on disk, logits in fp32, and noise in the dtype of the weights.

    Exit status 3 if they differ, 2 if their logits can't be computed; the report is written all the same.
    """
    named = {"base": base, "adapter": adapter}
    refuse_missing(hf=hf, mcore=mcore, **{name: folder for name, folder in named.items() if folder is not None})
    from mcore.verify.verify import verify as run  # torch and megatron: seconds that --help need not wait for

    report = run(
        hf,
        mcore,
        output,
        base=base,
        adapter=adapter,
        iteration=iteration,
        max_relative_error=max_relative_error,
        num_prompts=num_prompts,
        max_prompt_tokens=max_prompt_tokens,
        dtype=dtype,
        max_noise_ratio=max_noise_ratio,
        against_peers=against_peers,
        overwrite=overwrite,
    )
    report.raise_if_failed()


if __name__ == "__main__":
    run_as_child(app)
