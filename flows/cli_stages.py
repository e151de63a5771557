"""Single stages by hand: each runs the stage's own command, without store and without Prefect."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.schema.evaluate import EvaluateConfig
from flows.children import become, run_in_terminal
from flows.held_devices import held_devices
from mcore.artifacts import digest_of, file_digest
from mcore.child import ERROR_FILE_VARIABLE
from mcore.devices import installed_gpus, visible
from mcore.errors import EXIT_OK, ConfigError, Problem, SourceError
from mcore.folders import missing, refuse_existing
from mcore.progress import say
from mcore.select import iterations_in
from mcore.sources.resolve import HUB_SOURCE, ResolvedSource, resolve
from tasks.graph import MODEL_FILES
from tasks.model_folder import collected
from tasks.preflight import check_training_file
from tasks.preflight.devices import count_problems, request_of

stages = typer.Typer()
PANEL = "Single stages by hand"
MODELS = Path("models")
"""Where fetched models go if nothing else is said."""
METRICS = "metrics.json"

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Model = Annotated[
    str,
    typer.Option(
        metavar="SRC",
        help="A Hugging Face folder, a name of the catalogue (smollm2-135m-instruct), hf:org/name or ms:org/name, both "
        "with @revision behind it if wanted. What is no folder is fetched to models/ first.",
    ),
]
Output = Annotated[Path, typer.Option(metavar="DIR", help="Folder to make; it appears whole or not at all.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that divide the work.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")]
Base = Annotated[
    Path | None,
    typer.Option(metavar="BASE_DIR", help="Base of a LoRA run: the checkpoint folder that it started from."),
]
Adapter = Annotated[
    Path | None, typer.Option(metavar="ADAPTER_DIR", help="PEFT adapter that counts on top of the Hugging Face folder.")
]
Python = Annotated[str, typer.Option(metavar="PROGRAM", help="Interpreter of the environment that vLLM is in.")]


@stages.command(rich_help_panel=PANEL)
def fetch(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="As --model of `convert`, but no folder.")],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to make; models/<name> if not given.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Download a model as an ordinary Hugging Face folder."""
    become(_fetch_command(source, output or MODELS / _model_name(source), overwrite=overwrite))


@stages.command(rich_help_panel=PANEL)
def convert(
    model: Model,
    output: Output,
    make_vocab_size_divisible_by: Annotated[
        int, typer.Option(min=1, help="Pad the vocabulary with zero rows to a multiple of this.")
    ] = 128,
    workers: Workers = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be written, and how long it would take.")
    ] = False,
    disk_gb_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="Disk speed that a dry run goes by; measured if not given.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Hugging Face to megatron-core: DIR/release/, the tracker, and DIR/hf/ with config and tokenizer for export."""
    if not dry_run:
        refuse_existing(output, overwrite=overwrite)
    speed = [] if disk_gb_per_s is None else ["--disk-gb-per-s", disk_gb_per_s]
    divisor = ["--make-vocab-size-divisible-by", make_vocab_size_divisible_by]
    options = [*divisor, "--workers", workers, *speed, *_flag(overwrite=overwrite, dry_run=dry_run)]
    become(_convert_command(local_model(model), output, *options))


@stages.command(rich_help_panel=PANEL)
def export(
    checkpoint: Annotated[
        Path, typer.Option(metavar="DIR", help="Checkpoint folder, with the tracker or one iteration in it.")
    ],
    output: Output,
    hf: Annotated[
        Path | None,
        typer.Option(metavar="HF_DIR", help="Folder with the base model's config and tokenizer; DIR/hf if not given."),
    ] = None,
    base: Base = None,
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora/--no-merge-lora", help="Of a LoRA run: merged weights, or the adapter.")
    ] = True,
    iteration: Annotated[int | None, typer.Option(help="Iteration; the newest complete one if not given.")] = None,
    torch_dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the written weights; auto: as in the checkpoint.")
    ] = "auto",
    max_shard_size_gb: Annotated[float, typer.Option(min=0.001, help="Largest file, in 10^9 bytes.")] = 5.0,
    workers: Workers = 1,
    overwrite: Overwrite = False,
) -> None:
    """megatron-core to Hugging Face: sharded safetensors with config, tokenizer and chat template."""
    _check_iteration(checkpoint, iteration)
    become(
        _command(
            "mcore.bridge", "export", "--checkpoint", checkpoint, "--output", output, *_iteration(iteration),
            *([] if hf is None else ["--hf", hf]), *_base(base), "--torch-dtype", torch_dtype,
            "--max-shard-size-gb", max_shard_size_gb,
            "--workers", workers, *_flag(overwrite=overwrite, no_merge_lora=not merge_lora),
        )
    )  # fmt: skip


@stages.command(rich_help_panel=PANEL)
def verify(
    hf: Annotated[Path, typer.Option(metavar="HF_DIR", help="Hugging Face folder.")],
    mcore: Annotated[Path, typer.Option(metavar="DIR", help="Checkpoint folder, with the tracker and hf/ in it.")],
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the report in this folder.")] = None,
    base: Base = None,
    adapter: Adapter = None,
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
    overwrite: Overwrite = False,
) -> None:
    """Prove that two folders are the same model: bits on disk, then logits. Status 3 if they are not."""
    _check_iteration(mcore, iteration)
    with _kept_or_temporary(output, overwrite=overwrite) as folder:
        page = folder / "report.md"
        before = page.stat() if page.exists() else None  # of an earlier proof, which is not this one's result
        status = run_in_terminal(
            _command(
                "mcore.verify", "--hf", hf, "--mcore", mcore, "--output", folder, *_base(base), *_adapter(adapter),
                *_iteration(iteration), "--max-relative-error", max_relative_error, "--num-prompts", num_prompts,
                "--max-prompt-tokens", max_prompt_tokens, "--dtype", dtype, "--max-noise-ratio", max_noise_ratio,
                *_flag(overwrite=overwrite, against_peers=against_peers),
            ),
            quiet=True,
        )  # fmt: skip
        if page.exists() and (before is None or not os.path.samestat(page.stat(), before)):
            text = page.read_text()
            # Dozens of rows that matter where something is off; the file has them in any case.
            _show_page(text if status else text.partition("\n## Parts\n")[0], output and output / page.name)
    raise typer.Exit(status)


@stages.command(rich_help_panel=PANEL)
def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run; its data, train and launch count.")],
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Checkpoint to start from; made of the run's model if not given. A Hugging Face folder with "
            "train.load_safetensors.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DATA_DIR", help="What `prepare` made of the run; made as OUTPUT-data if not given."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run's folder, resumed if it has checkpoints; output/<name>."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="GROUP.FIELD=VALUE", help="Change a field; may be repeated.")
    ] = None,
) -> None:
    """Train on megatron-core with as many processes as launch.nproc_per_node says; the same command goes on again.

    On this machine alone. Without --base the run's model is converted to OUTPUT-base first, unless it was before; with
    train.load_safetensors it is taken as it is. Its devices are held as a run holds them, and waited for.
    """
    run = check_training_file(run_file, overrides or [], needs_model=base is None)
    if not run.launch.is_single_machine:
        found = f"launcher: {run.launch.launcher}, nnodes: {run.launch.nnodes}"
        fix = "Use `mcore-flows run`, which has a store that machines share, or set them for this command."
        raise ConfigError(
            "this command trains on this machine alone", [Problem("launch", "launcher: local, nnodes: 1", found, fix)]
        )
    devices = request_of(run.launch, run.launch.nproc_per_node, f"mcore-flows train, {run.name}")
    needs = {"launch.nproc_per_node": devices.count}
    if problems := count_problems(run.launch, visible(installed_gpus()), needs):
        raise ConfigError("this machine has not the devices", problems)
    output = output or Path("output") / run.name
    if base is None and run.train.load_safetensors:
        base = local_model(run.model.source)
    if base is None:
        base = output.with_name(f"{output.name}-base")
        _make_base(base, run.model.source, run.convert.make_vocab_size_divisible_by)
    with tempfile.TemporaryDirectory(prefix="mcore-flows-") as folder:
        written, error_file = Path(folder) / "run.yaml", Path(folder) / "error.json"
        written.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
        prepared = [] if data is None else ["--data", data]
        command = ["mcore.train", written, "--base", base, "--output", output, *prepared]
        if run.launch.nproc_per_node > 1:
            # The address keeps torchrun from asking what the host is called, which not every host can answer.
            processes = ["--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", run.launch.nproc_per_node]
            command = ["mcore.train.torchrun", *processes, "-m", *command]
        with held_devices(devices) as lease:
            variables = {ERROR_FILE_VARIABLE: str(error_file)} | lease.environment
            command = [sys.executable, "-m", *command]
            status = run_in_terminal(command, variables, saves=True, pass_fds=lease.descriptors)
    raise typer.Exit(status)


@stages.command(rich_help_panel=PANEL)
def evaluate(
    model: Model,
    suite: Annotated[Path, typer.Option(metavar="FILE", help="Suite of prompts and expectations (configs/suites/).")],
    adapter: Adapter = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep answers and summary in this folder.")] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Held-out rows, PATH or PATH#N; may be repeated.")
    ] = None,
    method: Annotated[Literal["sft", "pt"], typer.Option(help="Kind of the held-out rows.")] = "sft",
    torch_dtype: Annotated[Dtype, typer.Option(help="Dtype to compute in; auto: the checkpoint's own.")] = "auto",
    max_model_len: Annotated[int, typer.Option(min=32, help="Tokens: longest prompt and answer together.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens: longest answer.")] = 64,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs to divide the model over.")] = 1,
    model_name: Annotated[str, typer.Option(help="Fills {{NAME}} in suite and rows.")] = "",
    model_author: Annotated[str, typer.Option(help="Fills {{AUTHOR}} in suite and rows.")] = "",
    system: Annotated[str | None, typer.Option(help="System message where cases and rows bring none.")] = None,
    python: Python = EvaluateConfig.model_fields["python"].default,
    overwrite: Overwrite = False,
) -> None:
    """Ask a model the questions of a suite in vLLM, greedily, and show its answers."""
    _check_model_and_suite(model, suite)
    with _kept_or_temporary(output, overwrite=overwrite) as folder:
        asked = [word for file in perplexity or [] for word in ("--perplexity", file)]
        status = run_in_terminal(
            [
                python, "-m", "mcore.evaluate", "run", "--model", local_model(model), "--suite", suite, *asked,
                *_adapter(adapter),
                "--method", method, "--output", folder,
                "--torch-dtype", torch_dtype, "--max-model-len", max_model_len,
                "--max-tokens", max_tokens, "--tensor-parallel-size", tensor_parallel_size,
                "--model-name", model_name, "--model-author", model_author,
                *([] if system is None else ["--system", system]), *_flag(overwrite=overwrite),
            ],
            quiet=True,
        )  # fmt: skip
        if status == EXIT_OK:
            _show_answers(folder / "answers.jsonl")
            if output is not None:
                typer.echo(output)
    raise typer.Exit(status)


# -- commands


def _command(module: str, *arguments: object) -> list[object]:
    return [sys.executable, "-m", module, *arguments]


def _fetch_command(source: str, output: Path, *, overwrite: bool = False) -> list[object]:
    return _command("mcore.sources", "fetch", source, "--output", output, *_flag(overwrite=overwrite))


def _convert_command(hf: Path, output: Path, *options: object) -> list[object]:
    return _command("mcore.bridge", "convert", "--hf", hf, "--output", output, *options)


def _flag(**switches: bool) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name, is_on in switches.items() if is_on]


def _iteration(number: int | None) -> list[object]:
    return [] if number is None else ["--iteration", number]


def _adapter(folder: Path | None) -> list[object]:
    return [] if folder is None else ["--adapter", folder]


def _base(folder: Path | None) -> list[object]:
    return [] if folder is None else ["--base", folder]


def _must_succeed(command: list[object]) -> None:
    """Run a command that comes before the real one; its failure is this command's."""
    status = run_in_terminal(command, quiet=True)
    if status != EXIT_OK:
        raise typer.Exit(status)


# -- what commands work on


def _model_name(source: str) -> str:
    """Folder name of a fetched model: `name` of `hf:org/name@revision`, or the catalogue's name."""
    hub = HUB_SOURCE.fullmatch(source)
    return hub["repo"].partition("/")[2] if hub else Path(source).name


def local_model(source: str) -> Path:
    """The folder of a model, fetched to `models/` if it is no folder and was not fetched before.

    Raises:
        SourceError: There is no such model, or another one has its place in `models/`.
    """
    resolved = resolve(source)
    if resolved.path is not None:
        return resolved.path
    folder = MODELS / _model_name(source)
    if folder.exists():
        _check_fetched(folder, resolved)
        say(f"{source}: using {folder}")
    else:
        say(f"{source}: fetching to {folder}")
        _must_succeed(_fetch_command(source, folder))
    return folder


def _check_model_and_suite(source: str, suite: Path) -> None:
    """Both are looked for before the model is fetched; the stage itself sees the suite only then.

    Raises:
        ConfigError: At least one of them is not there.
    """
    problems = missing(suite=suite)
    collected(problems, lambda: resolve(source))
    if problems:
        raise ConfigError("what the command works on is not there", problems)


def _check_iteration(checkpoint: Path, iteration: int | None) -> None:
    """A folder of iterations must hold the one that is asked for; a folder that is something else the stage looks at.

    Raises:
        ConfigError: It is not there.
    """
    there = iterations_in(checkpoint) if checkpoint.is_dir() else []
    if there and iteration is not None and iteration not in there:
        expected = f"one of {', '.join(map(str, there))}"
        raise ConfigError(
            "there is no such iteration", [Problem(f"--iteration of {checkpoint}", expected, str(iteration))]
        )


def _check_fetched(folder: Path, resolved: ResolvedSource) -> None:
    # Models of one name by several organisations, and all revisions of one model, share a folder.
    found = _metrics_of(folder).get("source")
    if found != resolved.identity:
        raise SourceError(
            f"{folder} holds another model",
            [
                Problem(
                    resolved.source,
                    resolved.identity,
                    str(found) if found else f"no source in {folder / METRICS}",
                    f"To use what is there, give the folder as the model (./{folder}); to replace it, "
                    f"mcore-flows fetch {resolved.source} --overwrite; to have both, fetch to another --output.",
                )
            ],
        )


def _make_base(base: Path, source: str, divisor: int) -> None:
    """Convert a run's model, or check that this is what was converted before.

    Raises:
        ConfigError: The folder is there and was made of something else.
    """
    made_of = {"source": _content_of(source), "make_vocab_size_divisible_by": divisor}
    if not base.exists():
        say(f"{source}: converting to {base}")
        options = ["--make-vocab-size-divisible-by", divisor, "--source", made_of["source"]]
        _must_succeed(_convert_command(local_model(source), base, *options))
        return
    found = _metrics_of(base)
    fix = f"Remove {base} to have it made again, name another --output, or pass --base {base} to train on it as it is."
    problems = [
        Problem(f"{base}: {name}", str(value), str(found.get(name, "nothing that says so")), fix)
        for name, value in made_of.items()
        if found.get(name) != value
    ]
    if problems:
        raise ConfigError("the base that is there was not made of this run's model", problems)
    say(f"{source}: using {base}")


def _content_of(source: str) -> str:
    """The identity of a source; of a local folder, whose files may change, a digest of these."""
    resolved = resolve(source)
    if resolved.path is None:
        return resolved.identity
    files = {path.name: file_digest(path) for pattern in MODEL_FILES for path in resolved.path.glob(pattern)}
    return f"files {digest_of(files)}"


def _metrics_of(folder: Path) -> dict[str, Any]:
    """What the stage that made a folder wrote of it; nothing if the folder is none of ours."""
    try:
        found = json.loads((folder / METRICS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _kept_or_temporary(output: Path | None, *, overwrite: bool) -> Iterator[Path]:
    """The output folder, or one that is gone when its content was shown."""
    if output is not None:
        refuse_existing(output, overwrite=overwrite)
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="mcore-flows-") as folder:
        yield Path(folder) / "output"


# -- results


def _show_page(text: str, kept: Path | None) -> None:
    if sys.stdout.isatty():
        from rich.markdown import Markdown  # a tenth of a second that only this takes

        Console().print(Markdown(text))
    else:
        typer.echo(text, nl=False)
    if kept is not None:
        typer.echo(kept)


def _show_answers(file: Path) -> None:
    table = Table(show_lines=True)
    table.add_column("question", ratio=2)
    table.add_column("answer", ratio=3)
    for line in file.read_text().split("\n"):
        if line:
            record = json.loads(line)
            mark = Text("✓ ", "green") if record["passed"] else Text("✗ ", "red")
            table.add_row(Text(record["prompt"]), mark + Text(record["answer"].strip()))
    Console().print(table)
