"""Where the model and the rows come from, and what is taken of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flows.from_swift import table
from flows.from_swift.draft import Draft, Finding
from flows.from_swift.table import Argument
from mcore.data.sources.names import hub_dataset
from mcore.errors import Problem
from mcore.sources import catalogue
from mcore.sources.resolve import HUB_SOURCE

HUBS = {"hf": "the Hugging Face hub", "ms": "ModelScope"}


def model(draft: Draft, row: Argument) -> None:
    """`model`, with `use_hf` and `model_revision`: one source."""
    given = draft.given.get("model")
    if given is None:
        fix = "Add --model: a folder, or org/name."
        if "mcore_model" in draft.given:
            fix += " A megatron-core checkpoint is trained on with `mcore-flows train RUN.yaml --base DIR`."
        draft.problems.append(Problem("--model", "the base model", "nothing", fix))
        return
    revision = f"@{draft.given['model_revision']}" if "model_revision" in draft.given else ""
    source = str(given)
    is_folder = Path(source).expanduser().is_dir() or source.startswith((".", "/", "~"))
    if not is_folder and source not in catalogue.names():
        source = f"{_hub(draft)}:{source}{revision}"
        if not HUB_SOURCE.fullmatch(source):
            draft.problems.append(Problem("--model", "a folder, or org/name", str(given)))
            return
    draft.source = source
    draft.put(row, source, "carried" if is_folder else "changed", "" if is_folder else row.note)


def _hub(draft: Draft) -> Literal["hf", "ms"]:
    """The hub of names that name none."""
    return "hf" if draft.get("use_hf") or draft.command.environment.get("USE_HF", "0") in {"1", "true"} else "ms"


def part_of_model(draft: Draft, row: Argument) -> None:
    """What `model` has read already."""
    if row.name in draft.given:
        draft.note(row, "changed", row.note)


def torch_dtype(draft: Draft, row: Argument) -> None:
    """The model's own dtype if none is given."""
    if "torch_dtype" in draft.given:
        draft.put(row, draft.given["torch_dtype"], "carried")
        return
    config = draft.hf_config
    if config is None:
        comment = "Megatron-SWIFT takes the dtype of the model's config.json; put it here if it is float32."
        draft.put(row, "bfloat16", "to do", comment, comment=comment)
        return
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    draft.put(row, name, "default", "that of the model's config.json")


def max_length(draft: Draft, row: Argument) -> None:
    """The model's maximum if none is given; where that is not known, no sample may be lost for it."""
    if "max_length" in draft.given:
        draft.put(row, draft.given["max_length"], "carried")
        return
    maximum = (draft.hf_config or {}).get("max_position_embeddings")
    if isinstance(maximum, int):
        draft.put(row, maximum, "default", "the model's maximum")
        return
    comment = "Megatron-SWIFT takes the model's maximum; put it here."
    draft.put(row, table.field("data.max_length").default, "to do", comment, comment=comment)


def truncation_strategy(draft: Draft, row: Argument) -> None:
    """What happens to longer samples; they are an error while nobody knows how long a sample may be."""
    if "truncation_strategy" in draft.given:
        draft.put(row, draft.given["truncation_strategy"], "carried")
    elif "data.max_length" not in draft.comments:
        draft.put(row, row.default, "default", "raise here if nothing is said")


def dataset(draft: Draft, row: Argument) -> None:
    """Files, folders and names as they are; with `use_hf`, names that name no hub are Hugging Face's."""
    given = draft.given.get(row.name, [])
    specs = [str(spec) for spec in (given if isinstance(given, list) else [given])]
    if not specs:
        if row.name == "dataset":
            fix = "Add --dataset: files of rows." + " Cached datasets are not read." * ("cached_dataset" in draft.given)
            draft.problems.append(Problem("--dataset", "at least one file", "nothing", fix))
        return
    assert row.target is not None
    entries = []
    for spec in specs:
        name, mark, count = spec.rpartition("#")
        if not mark or not count.isdigit():
            name, mark, count = spec, "", ""
        source = hub_dataset(name)
        if isinstance(source, str):
            draft.problems.append(Problem(f"--{row.name} {spec}", found=source))
            continue
        is_bare = source is not None and not name.startswith(("hf:", "ms:"))
        entries.append(f"hf:{spec}" if is_bare and _hub(draft) == "hf" else spec)
        note = "" if source is None else f"from {HUBS[_hub(draft) if is_bare else source.hub]} when the run needs it"
        draft.findings.append(Finding(row.name, spec, "carried", f"{row.target}: {entries[-1]}", note, row.effect))
    draft.values[row.target] = entries


def shuffle(draft: Draft, row: Argument) -> None:
    """Two shuffles there, one here: the order of training decides."""
    rows, loader = draft.get("dataset_shuffle"), draft.get("train_dataloader_shuffle")
    if row.name not in draft.given:
        return
    if rows == loader:
        draft.put(row, draft.given[row.name], "carried" if row.name == "dataset_shuffle" else "changed", row.note)
    elif row.name == "train_dataloader_shuffle":
        draft.put(row, loader, "changed", row.note)
    else:
        draft.values["data.dataset_shuffle"] = bool(loader)
        draft.note(row, "left out", "one shuffle here: that of train_dataloader_shuffle")


def system(draft: Draft, row: Argument) -> None:
    """A text, or there also a file with it."""
    if row.name not in draft.given:
        return
    text = str(draft.given[row.name])
    path = Path(text)
    if path.suffix == ".txt" and "\n" not in text and path.is_file():
        draft.put(row, path.read_text(), "changed", f"the content of {text}")
    else:
        draft.put(row, text, "carried")


def loss_scale(draft: Draft, row: Argument) -> None:
    """A field for sft; pt trains all tokens there and here."""
    if row.name not in draft.given:
        return
    if draft.command.method == "sft":
        draft.put(row, row.here(draft.given[row.name]), "carried", row.note)
    else:
        is_so = draft.given[row.name] == "all"
        draft.note(row, "carried" if is_so else "left out", f"always so: {row.note}" if is_so else row.note)
