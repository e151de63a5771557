"""What transformers finds probable: in float32, the truth, and in the dtype that is served, which has noise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.schema.run import RunConfig
from mcore.errors import PrecisionError, Problem
from mcore.evaluate.served.prompts import served_prompts
from mcore.folders import whole_folder
from mcore.progress import progress

PROMPTS = "prompts.jsonl"


def write_reference(
    run: RunConfig,
    model: Path,
    output: Path,
    *,
    tokenizer: Path,
    adapter: Path | None,
    torch_dtype: str,
    num_prompts: int,
    template_is_served: bool,
    overwrite: bool = False,
) -> None:
    """Write prompts of a run with their log-probabilities; the first half of the proof, without vLLM.

    Args:
        run: The run.
        model: The exported model; of an adapter its base.
        output: Folder to write.
        tokenizer: Folder whose tokenizer and template training used: the base model's.
        adapter: PEFT adapter on top of `model`.
        torch_dtype: What is served in.
        num_prompts: Prompts.
        template_is_served: Whether the folder's template does by itself what the run says of prompts.
        overwrite: Replace the output folder.

    Raises:
        DataError: No row can be used.
        PrecisionError: The model's probabilities are no numbers.
    """
    evaluate = run.evaluate
    max_tokens = min(run.data.max_length, 1023 if evaluate is None else evaluate.max_model_len - 1)
    prompts = served_prompts(
        run.data, run.train.method, tokenizer,
        num_prompts=num_prompts, max_tokens=max_tokens, template_is_served=template_is_served,
    )  # fmt: skip
    sequences = [prompt.token_ids for prompt in prompts]
    exact = list(_logprobs(model, adapter, "float32", sequences))
    noisy = exact if torch_dtype == "float32" else list(_logprobs(model, adapter, torch_dtype, sequences))
    if not all(value == value and abs(value) != float("inf") for one in (*exact, *noisy) for value in one):
        raise PrecisionError("the model can't be served", [Problem(f"logits of {model}", "numbers", "NaN or infinity")])
    with whole_folder(output, overwrite=overwrite) as folder:
        lines = (
            json.dumps({**asdict(prompt), "exact": truth, "reference": noise}, ensure_ascii=False)
            for prompt, truth, noise in zip(prompts, exact, noisy, strict=True)
        )
        (folder / PROMPTS).write_text("".join(f"{line}\n" for line in lines))


def _logprobs(
    model_dir: Path, adapter: Path | None, torch_dtype: str, sequences: Sequence[Sequence[int]]
) -> Iterator[list[float]]:
    """For each sequence the log-probability (nats) of its tokens from the second on."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, torch_dtype), local_files_only=True, trust_remote_code=False
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    with torch.no_grad(), progress(f"transformers, {torch_dtype}", len(sequences), "prompts") as advance:
        for ids in sequences:
            ids_S = torch.tensor(ids)
            logprobs_SV = model(input_ids=ids_S[None]).logits[0].float().log_softmax(-1)
            yield logprobs_SV[:-1].gather(1, ids_S[1:, None])[:, 0].tolist()
            advance(1)
