"""Where the model and the rows come from, and what is taken of them."""

from __future__ import annotations

import re
from pathlib import Path

from flows.from_swift import table
from flows.from_swift.draft import Draft, Finding, Outcome
from flows.from_swift.table import Argument
from mcore.errors import Problem
from mcore.sources import catalogue
from mcore.sources.resolve import HUB_SOURCE

RAW_FILE = re.compile(r"\.(jsonl|json|csv|txt)$")
DATA_FOLDER = "data"
"""Where the run file expects what is still to be downloaded."""


def model(draft: Draft, row: Argument) -> None:
    """`model`, with `use_hf` and `model_revision`: one source."""
    given = draft.given.get("model")
    if given is None:
        fix = "Add --model: a folder, or org/name."
        if "mcore_model" in draft.given:
            fix += " A megatron-core checkpoint is trained on with `mcore-flows train RUN.yaml --base DIR`."
        draft.problems.append(Problem("--model", "the base model", "nothing", fix))
        return
    hub = "hf" if draft.get("use_hf") or draft.command.environment.get("USE_HF", "0") in {"1", "true"} else "ms"
    revision = f"@{draft.given['model_revision']}" if "model_revision" in draft.given else ""
    source = str(given)
    is_folder = Path(source).expanduser().is_dir() or source.startswith((".", "/", "~"))
    if not is_folder and source not in catalogue.names():
        source = f"{hub}:{source}{revision}"
        if not HUB_SOURCE.fullmatch(source):
            draft.problems.append(Problem("--model", "a folder, or org/name", str(given)))
            return
    draft.source = source
    draft.put(row, source, "carried" if is_folder else "changed", "" if is_folder else row.note)


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
    """Files stay what they are; what lies on a hub is still to be downloaded."""
    given = draft.given.get(row.name, [])
    specs = [str(spec) for spec in (given if isinstance(given, list) else [given])]
    if not specs:
        if row.name == "dataset":
            fix = "Add --dataset: files of rows." + " Cached datasets are not read." * ("cached_dataset" in draft.given)
            draft.problems.append(Problem("--dataset", "at least one file", "nothing", fix))
        return
    files = {spec: _file_of(spec, draft.command.method) for spec in specs}
    advice = {spec: text for spec, (_, text) in files.items() if text}
    assert row.target is not None
    draft.values[row.target] = [file for file, _ in files.values()]
    draft.comments[row.target] = " ".join(f"{spec}: {text}." for spec, text in advice.items())
    for spec, (file, text) in files.items():
        outcome: Outcome = "to do" if text else "carried"
        draft.findings.append(Finding(row.name, spec, outcome, f"{row.target}: {file}", text, row.effect))


def _file_of(spec: str, method: str) -> tuple[str, str]:
    """The file that a dataset's name stands for in the run, and what is to be done before it is there."""
    name, mark, count = spec.rpartition("#")
    if not mark or not count.isdigit():
        name, mark, count = spec, "", ""
    rows = "messages" if method == "sft" else "text"
    is_here = Path(name).expanduser().exists() or name.startswith((".", "/", "~"))
    if is_here or RAW_FILE.search(name):
        if name.endswith(".jsonl"):
            return spec, ""
        file = str(Path(name).with_suffix(".jsonl"))
        return f"{file}{mark}{count}", f"write its rows to {file}, one JSON object with {rows} a line"
    repository, _, subset = re.sub(r"^(hf|ms)::", "", name).partition(":")
    base = "-".join([Path(repository).name, *filter(None, subset.split("/"))])
    file = f"{DATA_FOLDER}/{base}.jsonl"
    return f"{file}{mark}{count}", f"download it to {file}, one JSON object with {rows} a line"


def name_or_author(draft: Draft, row: Argument) -> None:
    """Self-cognition: there one value for Chinese and one for English rows."""
    if row.name not in draft.given:
        return
    given = draft.given[row.name]
    values = given if isinstance(given, list) else [given]
    is_same = len(set(map(str, values))) == 1
    draft.put(row, str(values[-1]), "carried" if is_same else "changed", "" if is_same else row.note,
              comment="" if is_same else f"{values[0]} in rows in Chinese")  # fmt: skip


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
    """`default` for sft, `all` for pt: what the method means here."""
    if row.name not in draft.given:
        return
    is_so = draft.given[row.name] == {"sft": "default", "pt": "all"}[draft.command.method]
    draft.note(row, "carried" if is_so else "left out", f"always so: {row.note}" if is_so else row.note)
