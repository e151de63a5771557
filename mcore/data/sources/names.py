"""How a run names a data set of a hub.

    hf:org/name[@revision][:subset1/subset2][:split]    the Hugging Face hub
    ms:org/name[@revision][:subset1/subset2][:split]    ModelScope
    org/name[@revision][:subset1/subset2][:split]       ModelScope, where no such file or folder is there

`hf::` and `ms::`, as Megatron-SWIFT writes them, mean the same. The split is `train` if none is named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(
    r"(?:(?P<hub>hf|ms)::?)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<subsets>[\w.-]+(?:/[\w.-]+)*)?)?(?::(?P<split>[\w.-]+))?"
)
_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|txt)(\.gz|\.zst)?$")
DEFAULT_BRANCH = {"hf": "main", "ms": "master"}


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A data set of a hub; subsets in the order of their rows, none for the only one there is."""

    hub: Literal["hf", "ms"]
    repo: str
    revision: str
    subsets: tuple[str, ...] = ()
    split: str = "train"

    @property
    def rows(self) -> str:
        """What is taken of the repository, for names of folders and keys."""
        return f"{'/'.join(self.subsets)}:{self.split}"

    def __str__(self) -> str:
        revision = "" if self.revision == DEFAULT_BRANCH[self.hub] else f"@{self.revision}"
        rows = "" if self.rows == ":train" else f":{self.rows}".removesuffix(":train")
        return f"{self.hub}:{self.repo}{revision}{rows}"


def hub_dataset(text: str) -> HubDataset | str | None:
    """The data set of a hub that an entry names, what is wrong with it in words, or None for a file or folder."""
    match = _NAME.fullmatch(text)
    if text.startswith(("hf:", "ms:")):
        if match is None:
            return "no name of a data set: hf:org/name[@revision][:subset1/subset2][:split], or ms:…"
    elif match is None or text.startswith(".") or _FILE.search(text) or Path(text).exists():
        return None
    hub = cast(Literal["hf", "ms"], match["hub"] or "ms")
    subsets = tuple(match["subsets"].split("/")) if match["subsets"] else ()
    return HubDataset(hub, match["repo"], match["revision"] or DEFAULT_BRANCH[hub], subsets, match["split"] or "train")
