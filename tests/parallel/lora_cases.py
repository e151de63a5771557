"""Runs under torchrun: training with adapters of each model in each layout, single steps, and a resumed run.

lora_cases.py FOLDER     FOLDER/<model>/ is a base and FOLDER/adapter-<model>/ a PEFT adapter of it.
                         FOLDER/<case>-<model>/ becomes the run of it; FOLDER/step-<case>-<model>/ one step of a run
                         that starts from the adapter
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from configs.schema.run import RunConfig
from mcore.backend.parallel import stop
from mcore.train.run import train
from tests.parallel.train_cases import back_to_first_checkpoint
from tests.tiny_runs import tiny_run

TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": TP2,
    "tp2_sp": TP2_SP,
    "tp2_sp_etp2": {**TP2_SP, "expert_tensor_parallel_size": 2},
    "pp2": PP2,
    "pp2_vpp2": VPP2,
    "cp2": {"context_parallel_size": 2},
    "dp2": {},
    "dp2_whole": {"use_distributed_optimizer": False},
    "ep2": EP2,
    "tp2_pp2": {**TP2, **PP2},
    "tp2_sp_ep2": {**TP2_SP, **EP2},
    "etp2": {"expert_tensor_parallel_size": 2},
    "pp2_ep2": {**PP2, **EP2},
    "tp2_sp_vpp2": {**TP2_SP, **VPP2},
}
EXPERTS = ("qwen3_moe", "deepseek_v3")
RUNS: dict[int, list[tuple[str, str]]] = {
    2: [
        *((case, "llama") for case in ("tp2", "tp2_sp", "pp2", "dp2", "dp2_whole")),
        ("tp2_sp", "gemma2"),
        *(("cp2", name) for name in ("llama", "gemma2", *EXPERTS)),
        *((case, "qwen3_tied") for case in ("pp2", "pp2_vpp2")),
        *((case, name) for case in ("tp2_sp", "tp2_sp_etp2", "ep2", "pp2", "pp2_vpp2") for name in EXPERTS),
        *((case, "qwen3_moe") for case in ("dp2", "etp2")),
    ],
    4: [
        *((case, "llama") for case in ("tp2_pp2", "tp2_sp_vpp2")),
        ("tp2_pp2", "gemma2"),
        *((case, "qwen3_moe") for case in ("tp2_sp_ep2", "pp2_ep2")),
    ],
}
"""Layouts and models by the number of processes. With experts megatron-core wants SP wherever there is TP."""
TARGETS: dict[str, tuple[str, ...]] = {
    "llama": ("all-linear", "all-embedding"),
    "gemma2": ("q_proj", "v_proj", "linear_proj", "linear_fc1", "linear_fc2"),
    "qwen3_tied": ("all-linear",),
    "qwen3_moe": ("all-linear", "all-router"),
    "deepseek_v3": ("all-linear", "all-router"),
}
WHOLE: dict[str, tuple[str, ...]] = {
    "llama": ("lm_head", "model.norm"),
    "gemma2": ("post_attention_layernorm", "layers.2.input_layernorm"),
    "qwen3_tied": ("q_norm",),
    "qwen3_moe": ("embed_tokens", "lm_head", "norm"),
    "deepseek_v3": ("lm_head", "q_a_layernorm", "kv_a_layernorm"),
}
"""Modules that learn whole beside the adapters: norms on either side of a layer, over heads, of latents."""
STEPS, SAVE_STEPS = 20, 10


def lora_run(folder: Path, name: str, *, nproc: int = 1, **train: Any) -> RunConfig:
    settings = {
        "tuner_type": "lora",
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "target_modules": TARGETS[name],
        "modules_to_save": WHOLE[name],
        "train_iters": STEPS,
        "save_steps": SAVE_STEPS,
        "lr": 5e-3,
        # Far above rounding: matrices of experts with hardly a token would else take steps as large as any by it.
        "adam_eps": 1e-5,
        "micro_batch_size": 2,
    }
    return tiny_run(folder, nproc=nproc, **(settings | train))


def one_step(folder: Path, name: str, *, nproc: int = 1, **train: Any) -> RunConfig:
    """A step from an adapter whose matrices are none of them zero: Adam's first moment then is the gradient's share."""
    start = {"adapter_load": str(folder / f"adapter-{name}"), "train_iters": 1, "lr_warmup_iters": 0, "clip_grad": 1e9}
    return lora_run(folder, name, nproc=nproc, **(start | train))


def main(folder: Path) -> None:
    nproc = int(os.environ["WORLD_SIZE"])
    for case, name in RUNS[nproc]:
        run = lora_run(folder, name, nproc=nproc, **LAYOUTS[case])
        train(run, folder / name, folder / f"{case}-{name}")
        run = one_step(folder, name, nproc=nproc, **LAYOUTS[case])
        train(run, folder / name, folder / f"step-{case}-{name}")
    if nproc == 2:
        for name, layout in (("llama", TP2_SP), ("qwen3_moe", EP2)):
            run = lora_run(folder, name, nproc=2, lora_dropout=0.3, **layout)
            train(run, folder / name, folder / f"dropout-{name}")
            back_to_first_checkpoint(folder / f"dropout-{name}", folder / f"resumed-{name}", SAVE_STEPS, STEPS)
            train(run, folder / name, folder / f"resumed-{name}")
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
