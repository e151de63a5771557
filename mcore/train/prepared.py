"""The samples of a run: of the folder that was prepared for it, or prepared on the spot."""

from __future__ import annotations

from pathlib import Path

from configs.schema.run import RunConfig
from mcore.backend.parallel import on_rank_0
from mcore.data.dataset import TokenDataset, open_datasets
from mcore.data.prepare.build import prepare


def prepared(run: RunConfig, hf_dir: Path, data: Path | None, output: Path) -> tuple[TokenDataset, TokenDataset]:
    """Training and validation samples. Every process calls this, and maps the same files.

    Args:
        run: The whole run.
        hf_dir: Folder with config, tokenizer and chat template of the base model.
        data: The prepared folder. If there is none, the first process makes `OUTPUT-data`, anew at each start, as rows
            and tokenizer may have changed.
        output: The run's folder, on a file system that all processes share.

    Raises:
        DataError: The data can't be used.
    """
    if data is None:
        folder = output.with_name(f"{output.name}-data")
        on_rank_0(lambda: prepare(run.data, run.train.method, hf_dir, folder))
    return open_datasets(data or folder)
