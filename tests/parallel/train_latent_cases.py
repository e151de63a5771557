"""Runs under torchrun: training of a model with latent attention, experts and layers for further tokens.

train_latent_cases.py FOLDER     FOLDER/base is there, FOLDER/<case> becomes the run of it
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mcore.backend.parallel import stop
from mcore.train.run import train
from tests.tiny_runs import tiny_run

CASES: dict[str, dict[str, Any]] = {
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}


def main(folder: Path) -> None:
    for case, options in CASES.items():
        train(tiny_run(folder, nproc=2, **options), folder / "base", folder / case)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
