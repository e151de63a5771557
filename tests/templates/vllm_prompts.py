"""Runs in .venv-vllm: prompts as vLLM's own renderer makes them of conversations, the way `LLM.chat` and its server do.

vllm_prompts.py IN OUT    both JSON: a list of {"folder", "messages", "tools", "kwargs"}; ids or {"refused": …} for each
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")

from vllm.engine.arg_utils import EngineArgs  # the environment has to be there before
from vllm.renderers import ChatParams
from vllm.renderers.registry import renderer_from_config

DATE = datetime(2024, 7, 26)


@cache
def renderer(folder: str) -> Any:
    """vLLM's, for the tokenizer and the template of a folder."""
    return renderer_from_config(
        EngineArgs(model=folder, max_model_len=65536, enforce_eager=True).create_engine_config()
    )


def prompt(folder: str, messages: list[Any], tools: list[Any], kwargs: dict[str, Any]) -> Any:
    """Token ids of a prompt."""
    options = {"add_generation_prompt": True, "continue_final_message": False, "tokenize": False}
    options |= {"tools": tools or None, "strftime_now": DATE.strftime, **kwargs}
    of_folder = renderer(folder)
    without_bos = of_folder.default_chat_tok_params.with_kwargs(add_special_tokens=False)
    try:
        _, (found,) = of_folder.render_chat([messages], ChatParams(chat_template_kwargs=options), without_bos)
    except Exception as exc:
        return {"refused": str(exc)}
    return list(found["prompt_token_ids"])


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([prompt(**case) for case in cases]))
