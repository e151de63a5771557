"""An adapter on transformers' model, as PEFT puts it there: all of it, or an error that lists what is not.

PEFT itself warns of matrices that it does not find, and goes on with such as do nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mcore.errors import ConfigError, Problem


def put_on(model: Any, adapter: Path) -> None:
    """Let PEFT put an adapter on a transformers model, in the model's own dtype.

    Raises:
        ConfigError: PEFT can't load it, or not all of it.
    """
    from peft import PeftConfig, PeftModel  # seconds that a proof without an adapter need not wait for

    try:
        config = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = True
        peft = PeftModel(model, config, autocast_adapter_dtype=False)
        loaded = peft.load_adapter(adapter, "default", autocast_adapter_dtype=False)
    except Exception as exc:  # PEFT raises many kinds
        raise ConfigError("PEFT can't load the adapter", [Problem(str(adapter), "an adapter", repr(exc))]) from exc
    problems = [
        Problem(str(name), "what PEFT looks for in the file, and all of that", kind.replace("_", " "))
        for kind, names in (("missing_keys", loaded.missing_keys), ("unexpected_keys", loaded.unexpected_keys))
        for name in sorted(names)
        if kind == "unexpected_keys" or ".lora_" in name or ".modules_to_save." in name
    ]
    if problems:
        raise ConfigError(f"{adapter} is no whole adapter for PEFT", problems)
