"""`python -m mcore.evaluate.served reference …` (with transformers) and, behind it, `… check` (with vLLM)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.schema.load import load_run
from mcore.child import run_as_child
from mcore.folders import whole_folder

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Model = Annotated[Path, typer.Option(help="The exported Hugging Face folder; of an adapter its base.")]
Adapter = Annotated[Path | None, typer.Option(help="PEFT adapter on top of MODEL.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="What is served in.")]
Output = Annotated[Path, typer.Option(help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]


@app.command()
def reference(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run: its data, as it was trained on.")],
    model: Model,
    output: Output,
    tokenizer: Annotated[Path, typer.Option(help="Folder whose tokenizer training used: the base model's.")],
    adapter: Adapter = None,
    torch_dtype: Dtype = "auto",
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 16,
    template_is_served: Annotated[
        bool, typer.Option("--template-is-served", help="The folder's template knows the run's system message.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write prompts of a run as training has them, and what transformers finds probable."""
    from mcore.evaluate.engine import EngineSettings
    from mcore.evaluate.served.reference import write_reference

    write_reference(
        load_run(run_file),
        model,
        output,
        tokenizer=tokenizer,
        adapter=adapter,
        torch_dtype=EngineSettings(model, torch_dtype).resolved_dtype,
        num_prompts=num_prompts,
        template_is_served=template_is_served,
        overwrite=overwrite,
    )


@app.command()
def check(
    reference: Annotated[Path, typer.Option(help="Folder that `reference` wrote.")],
    model: Model,
    output: Output,
    adapter: Adapter = None,
    torch_dtype: Dtype = "auto",
    max_model_len: Annotated[int, typer.Option(min=32, help="Tokens: the longest prompt and answer together.")] = 1024,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs to divide the model over.")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Ask vLLM the same, and hold it against the reference. Status 3 if it is not the same."""
    from mcore.evaluate.engine import EngineSettings, prepare_environment, start_engine
    from mcore.evaluate.served.judge import judge
    from mcore.evaluate.served.reference import PROMPTS

    prepare_environment()
    prompts = [json.loads(line) for line in (reference / PROMPTS).read_text().split("\n") if line]
    settings = EngineSettings(model, torch_dtype, max_model_len, tensor_parallel_size, adapter=adapter)
    with start_engine(settings) as engine:
        served_ids = [engine.rendered(one) if one["messages"] else None for one in prompts]
        logprobs = engine.token_logprobs([one["token_ids"] for one in prompts], "served prompts")
    report = judge(prompts, served_ids, logprobs, settings.resolved_dtype)
    with whole_folder(output, overwrite=overwrite) as folder:
        (folder / PROMPTS).write_bytes((reference / PROMPTS).read_bytes())
        (folder / "report.json").write_text(report.to_json())
        (folder / "report.md").write_text(report.markdown() + "\n")
        (folder / "metrics.json").write_text(json.dumps(report.metrics(), indent=2))
    typer.echo(json.dumps(report.metrics()))
    report.raise_if_failed()


if __name__ == "__main__":
    run_as_child(app)
