"""Runs under torchrun: training that takes its base from safetensors and writes them, beside one that does neither.

train_safetensors_cases.py FOLDER     FOLDER/<model>/{hf,mcore} is a base, FOLDER/<case>-{live,file} the runs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mcore.backend.parallel import stop
from mcore.train.run import train
from tests.tiny_runs import tiny_run

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2": ("qwen3_moe", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": ("qwen3_tied", {"pipeline_model_parallel_size": 2}),
    "dp2": ("qwen3_tied", {}),
}
"""Model and layout of each case."""
SETTINGS = {"train_iters": 6, "save_steps": 2, "save_total_limit": 2, "torch_dtype": "bfloat16"}


def main(folder: Path) -> None:
    for case, (name, layout) in CASES.items():
        model = folder / name
        train(tiny_run(folder, nproc=2, **SETTINGS, **layout), model / "mcore", folder / f"{case}-file")
        live = {"load_safetensors": True, "save_safetensors": True}
        train(tiny_run(folder, nproc=2, **SETTINGS, **layout, **live), model / "hf", folder / f"{case}-live")
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
