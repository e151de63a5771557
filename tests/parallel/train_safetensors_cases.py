"""Runs under torchrun: training that takes its base from safetensors and writes them, beside one that does neither.

train_safetensors_cases.py FOLDER     FOLDER/<model>/{hf,mcore} is a base, FOLDER/<model>/<layout>-{live,file} the runs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mcore.backend.parallel import stop
from mcore.train.run import train
from tests.tiny_runs import tiny_run

CASES: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}
SETTINGS = {"train_iters": 6, "save_steps": 2, "save_total_limit": 2, "torch_dtype": "bfloat16"}


def main(folder: Path) -> None:
    for case, layout in CASES.items():
        for base in sorted(folder.glob("*/mcore")):
            model = base.parent
            train(tiny_run(folder, nproc=2, **SETTINGS, **layout), base, model / f"{case}-file")
            live = {"load_safetensors": True, "save_safetensors": True}
            train(tiny_run(folder, nproc=2, **SETTINGS, **layout, **live), model / "hf", model / f"{case}-live")
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
