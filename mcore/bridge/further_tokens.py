"""Layers for further tokens (MTP) that a config speaks of and files do not hold. No torch here.

transformers saves models without these layers, and leaves their number in `config.json` (or writes its default there).
Such a folder is whole: it is a model without them, and its config should say so.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

KEY = "num_nextn_predict_layers"
"""The field of `config.json` that tells their number."""


def config_of_files(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The config of the model that files hold: without layers for further tokens if there is no tensor of any.

    Args:
        config: The mapping of `config.json`.
        names: Names of the tensors that the files hold.
    """
    layers, further = config.get("num_hidden_layers"), config.get(KEY)
    if not isinstance(layers, int) or not isinstance(further, int) or further < 1:
        return dict(config)
    numbers: Container[str] = {str(layers + number) for number in range(further)}
    has_any = any(name.startswith("model.layers.") and name.split(".")[2] in numbers for name in names)
    return dict(config) if has_any else {**config, KEY: 0}
