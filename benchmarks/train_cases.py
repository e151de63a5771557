"""One case of `benchmarks.train`: a contender trains a shape for some steps, and prints its figures as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

MARK = "figures: "
"""Stands before them on their line, as libraries print to stdout as well."""
SEQUENCE = 4096
WARMUP_STEPS = 4
STEPS = 10
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
}
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "0.5b": QWEN2 | dict(zip(SIZES, (24, 896, 4864, 14, 2), strict=True)),
    "1.5b": QWEN2 | dict(zip(SIZES, (28, 1536, 8960, 12, 2), strict=True)),
    "3b": QWEN2 | dict(zip(SIZES, (36, 2048, 11008, 16, 2), strict=True)),
    "7b": QWEN2
    | dict(zip(SIZES, (28, 3584, 18944, 28, 4), strict=True))
    | {"vocab_size": 152064, "tie_word_embeddings": False},
    "14b": QWEN2
    | dict(zip(SIZES, (48, 5120, 13824, 40, 8), strict=True))
    | {"vocab_size": 152064, "tie_word_embeddings": False},
    "30b-a3b": QWEN2
    | dict(zip(SIZES, (48, 2048, 6144, 32, 4), strict=True))
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "tie_word_embeddings": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    },
    "tiny": QWEN2 | dict(zip(SIZES, (2, 64, 128, 4, 2), strict=True)) | {"vocab_size": 256},
}
"""Qwen2.5's own sizes, Qwen3-30B-A3B's, and one to try the benchmark with."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured.

    Attributes:
        shape: Of the model, a key of `SHAPES`.
        contender: Who trains it, a key of `CONTENDERS`.
        micro_batch_size: Samples a step.
        settings: Fields of `train`, for ours.
        profile: Whether some more steps are profiled behind the measured ones.
    """

    shape: str
    contender: str
    micro_batch_size: int
    settings: dict[str, Any] = field(default_factory=dict)
    profile: bool = False

    @property
    def tokens(self) -> int:
        """Trained tokens a step."""
        return self.micro_batch_size * self.sequence

    @property
    def sequence(self) -> int:
        """Tokens of a sample."""
        return 64 if self.shape == "tiny" else SEQUENCE

    @property
    def label(self) -> str:
        """What the card calls it."""
        if self.contender != "ours":
            return {"transformers": "transformers, SDPA, fused AdamW in bf16", "trl": "TRL SFTTrainer, SDPA"}[
                self.contender
            ]
        words = [f"ours, {self.settings['backend']}"]
        if self.settings.get("use_precision_aware_optimizer"):
            words.append("main weights as remainders")
        if self.settings.get("main_grads_dtype") == "bfloat16":
            words.append("gradients and moments in bf16")
        if fp8_format := self.settings.get("fp8_format"):
            words.append(f"FP8 {fp8_format}, {self.settings['fp8_recipe']} scales")
        if self.settings.get("tuner_type") == "lora":
            words.append(f"LoRA of rank {self.settings['lora_rank']} on all linear layers")
        if self.settings.get("recompute_granularity", "none") != "none":
            words.append(f"recomputing {', '.join(self.settings.get('recompute_modules', ['whole layers']))}")
        return ", ".join(words)

    @property
    def kind(self) -> str:
        """What is special about it: `lora`, `fp8` or nothing (`plain`)."""
        if self.settings.get("tuner_type") == "lora":
            return "lora"
        return "fp8" if self.settings.get("fp8_format") else "plain"

    @property
    def name(self) -> str:
        """Of its files."""
        backend = self.settings.get("backend", "")
        lean = "-".join(str(value) for key, value in self.settings.items() if key != "backend")
        return "_".join(filter(None, [self.shape, self.contender, backend, lean, str(self.micro_batch_size)]))


def main() -> None:
    """Train and print."""
    import torch

    from mcore.train.flops import ModelFlops
    from mcore.train.garbage import frozen_garbage
    from mcore.train.metrics import peak_flops

    case = Case(**json.loads(sys.argv[1]))
    step = CONTENDERS[case.contender]()(case)
    exits = ExitStack()
    exits.enter_context(frozen_garbage())  # the trainer does, and the others get it as well
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    steps_s, loss = [], float("nan")
    for _ in range(WARMUP_STEPS + STEPS):
        start = perf_counter()
        loss = step()
        steps_s.append(perf_counter() - start)
    figures = {
        "steps_s": steps_s[WARMUP_STEPS:],
        "flops": ModelFlops.of(SHAPES[case.shape]).of_step(
            [case.sequence] * case.micro_batch_size, case.tokens, is_frozen=case.settings.get("tuner_type") == "lora"
        ),
        "peak_flops": peak_flops(),
        "allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "loss": loss,
    }
    if case.profile:
        profile_steps(step, Path(sys.argv[2], case.name))
    sys.stdout.write(f"\n{MARK}{json.dumps(figures)}\n")  # on a line of its own, whatever a thread was printing
    sys.stdout.flush()
    os._exit(0)  # TRL's thread still waits for a next step


def profile_steps(step: Callable[[], float], path: Path) -> None:
    """Where the time of three steps goes: tables by kernel and by CPU time, and a trace to be opened in a viewer."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            step()
    averages = profiled.key_averages()
    for order in ("self_device_time_total", "self_cpu_time_total"):
        table = averages.table(sort_by=order, row_limit=40, max_name_column_width=100)
        path.with_name(f"{path.name}.{order}.txt").write_text(table)
    profiled.export_chrome_trace(f"{path}.trace.json.gz")


def ours() -> Callable[[Case], Callable[[], float]]:
    """The trainer's own step."""
    import torch
    from megatron.core.models.gpt import GPTModel

    from configs.schema.train import TrainConfig
    from mcore.backend import parallel
    from mcore.backend.layout import Layout
    from mcore.bridge.families import dims_of
    from mcore.data.dataset import TokenDataset
    from mcore.data.template import Sample
    from mcore.train.base import Base
    from mcore.train.loop import Loop
    from mcore.train.methods import pt
    from mcore.train.model import build_training
    from mcore.train.position import Position
    from mcore.train.schedule import Schedule
    from mcore.train.stop import StopRequest

    class RandomBase(Base):
        """Weights drawn on the device."""

        def fill(self, modules: Sequence[GPTModel]) -> None:
            torch.manual_seed(0)
            with torch.no_grad():
                for name, parameter in modules[0].named_parameters():
                    if "norm" in name:
                        parameter.fill_(1.0)
                    elif name.endswith("bias"):
                        parameter.zero_()
                    else:
                        parameter.normal_(std=0.02)

    def prepare(case: Case) -> Callable[[], float]:
        hf_config: Mapping[str, Any] = SHAPES[case.shape]
        dims = dims_of(hf_config, make_vocab_size_divisible_by=128)
        parallel.start(Layout(), seed=1)
        config = TrainConfig(
            method="pt",
            torch_dtype="bfloat16",
            micro_batch_size=case.micro_batch_size,
            global_batch_size=case.micro_batch_size,
            train_iters=100,
            packing=False,  # samples are as long as each other
            lr=1e-5,
            **case.settings,
        )
        schedule = Schedule(train_iters=100, lr_warmup_iters=0)
        base = RandomBase(hf_config, Path(), Path("random"), dims.padded_vocab)
        training = build_training(config, schedule, base, Layout(), has_weights=True)
        pt.prepare(training.modules[0], config)
        draw = torch.Generator().manual_seed(1)
        samples = [
            Sample(ids.tolist(), [False, *[True] * case.sequence])
            for ids in torch.randint(hf_config["vocab_size"], (16, case.sequence + 1), generator=draw)
        ]
        loop = Loop(
            config=config,
            schedule=schedule,
            layout=Layout(),
            output=Path(),
            training=training,
            forward_step=pt.forward_step,
            data=TokenDataset(samples),
            validation=TokenDataset([]),
            device=parallel.device(),
            stop=StopRequest(),
            hf_config=hf_config,
        )
        positions = (Position(number, number * case.micro_batch_size) for number in range(99))
        return lambda: loop.step(next(positions)).step.loss

    return prepare


def transformers() -> Callable[[Case], Callable[[], float]]:
    """A plain loop."""
    import torch

    def prepare(case: Case) -> Callable[[], float]:
        model = transformers_model(case)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        draw = torch.Generator().manual_seed(1)
        shape = (16, case.sequence)
        data = torch.randint(SHAPES[case.shape]["vocab_size"], shape, generator=draw).to(model.device)
        starts = iter(range(0, 10**6, case.micro_batch_size))

        def step() -> float:
            start = next(starts) % 16
            ids = data[start : start + case.micro_batch_size]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return step

    return prepare


def transformers_model(case: Case) -> Any:
    """The plain model in bf16 on the device, with random weights and SDPA."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{key: value for key, value in SHAPES[case.shape].items() if key != "architectures"})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()


def trl() -> Callable[[Case], Callable[[], float]]:
    """TRL's own training loop, which is taken a step at a time by a thread that it runs in."""
    import queue
    import threading

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    def prepare(case: Case) -> Callable[[], float]:
        model = transformers_model(case)
        ids = torch.randint(SHAPES[case.shape]["vocab_size"], (64, case.sequence)).tolist()
        turns: queue.Queue[None] = queue.Queue()
        done: queue.Queue[float | BaseException] = queue.Queue()

        class InTurn(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                turns.get()

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                if "loss" in logs:
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    done.put(logs["loss"])

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
            pad_token="<pad>",
            eos_token="<eos>",
        )
        arguments = SFTConfig(
            output_dir="trl",
            per_device_train_batch_size=case.micro_batch_size,
            max_steps=100,
            learning_rate=1e-5,
            max_length=case.sequence,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            processing_class=tokenizer,
            callbacks=[InTurn()],
        )

        def work() -> None:
            try:
                trainer.train()
            except BaseException as error:
                done.put(error)

        threading.Thread(target=work, daemon=True).start()

        def step() -> float:
            turns.put(None)
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            return result

        return step

    return prepare


CONTENDERS: dict[str, Callable[[], Callable[[Case], Callable[[], float]]]] = {
    "ours": ours,
    "transformers": transformers,
    "trl": trl,
}


if __name__ == "__main__":
    main()
