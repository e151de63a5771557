"""Run by vLLM's interpreter: log-probabilities and answers of a base with a PEFT adapter, and without.

lora_script.py BASE ADAPTER TOKENS     TOKENS is a JSON list of token ids; prints one JSON object
"""

import json
import sys

from mcore.evaluate.engine import prepare_environment


def main(base: str, adapter: str, tokens: str) -> None:
    prepare_environment()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model=base,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=8,
        use_tqdm_on_load=False,
    )
    ids = json.loads(tokens)
    params = SamplingParams(temperature=0.0, max_tokens=12, prompt_logprobs=0)
    found = {}
    for name, request in (("base", None), ("adapter", LoRARequest("ours", 1, adapter))):
        (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False, lora_request=request)
        logprobs = [
            position[token].logprob for position, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        ]
        found[name] = {"logprobs": logprobs, "token_ids": list(output.outputs[0].token_ids)}
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
