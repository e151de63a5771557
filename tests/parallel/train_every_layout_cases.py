"""Runs under torchrun: training of a dense model, one with experts and one with latents in every layout of its size.

train_every_layout_cases.py FOLDER [CASE …]     FOLDER/<model>/ is a base, FOLDER/<case>-<model>/ becomes the run of it
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

DENSE, EXPERTS, LATENT = "qwen3_tied", "qwen3_moe", "deepseek_v3"
CAPPED, SINKS = "gemma2", "gpt_oss"
MODELS = (DENSE, EXPERTS, LATENT)
ALL_MODELS = (*MODELS, CAPPED, SINKS)
"""Those with windows, capped scores and sinks are there for layouts that divide samples."""
WITH_EXPERTS = (EXPERTS, LATENT)
STEPS = 20
OWN: dict[str, dict[str, Any]] = {EXPERTS: {"lr": 9e-4}}
"""What runs of a model have of their own. With 1e-3 the model with experts comes to a token, in step 18, whose second
and third expert differ by 1.6e-6 of a logit: layouts round it to one or the other. With this the least is 1e-5."""

TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
TP4_SP = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
UNEVEN = {**PP2, "decoder_first_pipeline_num_layers": 1}
EP2, EP4 = ({"expert_model_parallel_size": size} for size in (2, 4))
CP2, CP4 = ({"context_parallel_size": size} for size in (2, 4))
ETP2 = {"expert_tensor_parallel_size": 2}

CASES: dict[int, dict[str, tuple[dict[str, Any], tuple[str, ...]]]] = {
    2: {
        "dp2": ({}, MODELS),
        "dp2_whole": ({"use_distributed_optimizer": False}, WITH_EXPERTS),
        "tp2": (TP2, (DENSE,)),
        "tp2_sp": (TP2_SP, MODELS),
        "tp2_sp_etp2": ({**TP2_SP, **ETP2}, WITH_EXPERTS),
        "tp2_sp_ep2": ({**TP2_SP, **EP2}, WITH_EXPERTS),
        "etp2": (ETP2, (EXPERTS,)),
        "ep2": (EP2, WITH_EXPERTS),
        "cp2": (CP2, ALL_MODELS),
        "cp2_ep2": ({**CP2, **EP2}, WITH_EXPERTS),
        "pp2": (PP2, MODELS),
        "pp2_vpp2": (VPP2, MODELS),
        "pp2_uneven": (UNEVEN, MODELS),
        "pp2_uneven_last": ({**PP2, "decoder_last_pipeline_num_layers": 1}, (DENSE,)),
    },
    4: {
        "tp4_sp": (TP4_SP, MODELS),
        "tp2_sp_dp2": (TP2_SP, (DENSE, EXPERTS)),
        "tp2_sp_ep4": ({**TP2_SP, **EP4}, (EXPERTS,)),
        "tp2_sp_ep2_etp2": ({**TP2_SP, **EP2, **ETP2}, WITH_EXPERTS),
        "ep2_dp4": (EP2, WITH_EXPERTS),
        "ep4": (EP4, WITH_EXPERTS),
        "ep2_etp2": ({**EP2, **ETP2}, WITH_EXPERTS),
        "cp4": (CP4, ALL_MODELS),
        "cp2_dp2": (CP2, MODELS),
        "cp2_dp2_whole": ({**CP2, "use_distributed_optimizer": False}, (EXPERTS,)),
        "cp2_ep4": ({**CP2, **EP4}, WITH_EXPERTS),
        "cp2_tp2": ({**CP2, **TP2}, (DENSE, CAPPED)),
        "cp2_tp2_sp": ({**CP2, **TP2_SP}, MODELS),
        "cp2_tp2_sp_ep2": ({**CP2, **TP2_SP, **EP2}, WITH_EXPERTS),
        "cp2_pp2": ({**CP2, **PP2}, (*MODELS, SINKS)),
        "cp2_pp2_vpp2": ({**CP2, **VPP2}, (DENSE, EXPERTS)),
        "pp4": (PP4, MODELS),
        "pp2_dp2": (PP2, (DENSE,)),
        "pp2_ep2": ({**PP2, **EP2}, WITH_EXPERTS),
        "pp2_vpp2_dp2": (VPP2, (DENSE,)),
        "pp2_vpp2_ep2": ({**VPP2, **EP2}, WITH_EXPERTS),
        "tp2_sp_pp2": ({**TP2_SP, **PP2}, MODELS),
        "tp2_sp_pp2_vpp2": ({**TP2_SP, **VPP2}, MODELS),
        "tp2_sp_pp2_uneven_ep2": ({**TP2_SP, **UNEVEN, **EP2}, WITH_EXPERTS),
    },
    8: {
        "tp2_sp_pp2_dp2": ({**TP2_SP, **PP2}, (DENSE,)),
        "tp2_sp_pp2_vpp2_dp2": ({**TP2_SP, **VPP2}, (DENSE,)),
        "tp2_sp_pp4": ({**TP2_SP, **PP4}, (LATENT,)),
        "tp2_sp_pp2_ep4": ({**TP2_SP, **PP2, **EP4}, (EXPERTS,)),
        "tp2_sp_pp2_ep2_etp2": ({**TP2_SP, **PP2, **EP2, **ETP2}, WITH_EXPERTS),
        "tp2_sp_pp2_vpp2_ep2": ({**TP2_SP, **VPP2, **EP2}, (LATENT,)),
        "cp2_tp2_sp_pp2": ({**CP2, **TP2_SP, **PP2}, MODELS),
        "cp2_tp2_sp_pp2_ep2": ({**CP2, **TP2_SP, **PP2, **EP2}, (EXPERTS,)),
        "tp4_sp_ep4_etp2": ({**TP4_SP, **EP4, **ETP2}, (EXPERTS,)),
    },
}
"""By number of processes: what a layout is, and the models that are trained in it."""

BALANCED: dict[int, dict[str, dict[str, Any]]] = {
    2: {"dp2": {}, "pp2_vpp2": VPP2, "tp2_sp": TP2_SP, "ep2": EP2, "cp2": CP2},
    4: {"cp2_tp2_sp": {**CP2, **TP2_SP}, "tp2_sp_pp2": {**TP2_SP, **PP2}, "tp2_sp_ep4": {**TP2_SP, **EP4}},
}
"""Layouts in which balancing losses, and biases that balance, are compared."""
BALANCING = {
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_z_loss_coeff": 0.01,
    "moe_router_bias_update_rate": 0.01,
    "packing": False,  # the loss is one over each sample
}
RESUMED = {"ep2": "pp2_vpp2", "pp2_vpp2": "tp2_sp_ep2", "tp2_sp": "ep2", "dp2": "tp2_sp"} | {
    "cp2": "dp2",
    "tp2_sp_ep2": "cp2_ep2",
}
"""Runs of the model with experts that are taken back to half, and the case whose layout they go on in."""
HALF = STEPS // 2


def layout_run(folder: Path, nproc: int, name: str, **options: Any) -> RunConfig:
    settings = {"train_iters": STEPS, "save_steps": HALF} | OWN.get(name, {}) | options
    return tiny_run(folder, nproc=nproc, **settings)


def main(folder: Path, only: list[str]) -> None:
    nproc = int(os.environ["WORLD_SIZE"])
    for case, (options, models) in CASES[nproc].items():
        for name in models:
            if not only or f"{case}-{name}" in only:
                train(layout_run(folder, nproc, name, **options), folder / name, folder / f"{case}-{name}")
    for case, options in BALANCED.get(nproc, {}).items():
        if not only or f"balanced-{case}" in only:
            run = layout_run(folder, nproc, LATENT, **options, **BALANCING)
            train(run, folder / LATENT, folder / f"balanced-{case}")
    if nproc == 2:
        for before, after in RESUMED.items():
            copy = folder / f"{before}_to_{after}"
            if not only or copy.name in only:
                back_to_first_checkpoint(folder / f"{before}-{EXPERTS}", copy, HALF, STEPS)
                train(layout_run(folder, 2, EXPERTS, **CASES[2][after][0]), folder / EXPERTS, copy)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
