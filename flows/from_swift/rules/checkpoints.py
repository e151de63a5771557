"""What a run starts from, and what it leaves."""

from __future__ import annotations

import re
from pathlib import Path

from flows.from_swift.draft import Draft
from flows.from_swift.table import Argument


def output_dir(draft: Draft, row: Argument) -> None:
    """The last part of the folder is the run's name; without one, the model's."""
    given = draft.given.get(row.name)
    name = Path(str(given)).name if given else draft.source.partition("@")[0].rpartition("/")[2] or draft.source
    name = re.sub(r"[^0-9a-z_.-]+", "-", name.lower()).lstrip("_.-")[:64]
    draft.values["name"] = name or "from-swift"
    if given:
        draft.note(row, "changed", row.note)


def save_safetensors(draft: Draft, row: Argument) -> None:
    """Whole weights beside every checkpoint; runs with adapters have none."""
    if draft.tuner_type == "full":
        if row.name in draft.given:
            draft.put(row, draft.given[row.name], "carried")
        else:
            draft.put(row, row.default, "default", "false here if nothing is said")
    elif row.name in draft.given:
        draft.note(row, "changed", row.note)


def merge_lora(draft: Draft, row: Argument) -> None:
    """As `save_safetensors`, if it is not given."""
    if draft.tuner_type != "lora":
        if row.name in draft.given:
            draft.note(row, "left out", "has no effect without --tuner_type lora", effect="nothing")
    elif row.name in draft.given:
        draft.put(row, draft.given[row.name], "carried", row.note)
    elif not draft.get("save_safetensors"):
        draft.put(row, False, "default", "as save_safetensors")


def load_safetensors(draft: Draft, row: Argument) -> None:
    """A way in that runs with adapters don't have."""
    if row.name not in draft.given:
        return
    if draft.tuner_type == "full":
        draft.put(row, draft.given[row.name], "carried")
    else:
        draft.note(row, "left out", "adapters are trained on the converted model", effect="nothing")


def max_shard_size(draft: Draft, row: Argument) -> None:
    """`5GB` as a number."""
    if row.name not in draft.given:
        return
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|MB)", str(draft.given[row.name]), re.IGNORECASE)
    if size is None:
        draft.note(row, "left out", "must look like 5GB")
    else:
        draft.put(row, float(size[1]) / (1000 if size[2].upper() == "MB" else 1), "carried")


def finetune(draft: Draft, row: Argument) -> None:
    """A run starts at step 0, and goes on by itself; from somebody else's checkpoint it can't."""
    if row.name not in draft.given:
        return
    if draft.get("finetune"):
        draft.note(row, "carried", "always so: a run starts from the base, and started again it goes on by itself")
    else:
        draft.note(row, "left out", row.note)


def adapters(draft: Draft, row: Argument) -> None:
    """One PEFT folder to start from."""
    if row.name not in draft.given:
        return
    given = draft.given[row.name]
    folders = given if isinstance(given, list) else [given]
    if draft.tuner_type != "lora":
        draft.note(row, "left out", "needs tuner_type lora here")
    elif len(folders) != 1:
        draft.note(row, "left out", "a run starts from one adapter")
    elif Path(str(folders[0])).expanduser().is_dir() or str(folders[0]).startswith((".", "/", "~")):
        draft.put(row, str(folders[0]), "changed", row.note)
    else:
        draft.put(row, str(folders[0]), "to do", f"a folder here: download {folders[0]} and name it")
