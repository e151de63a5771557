"""Sliding windows of attention, as each family's `config.json` tells them. No torch here.

A window of w tokens is the token itself and the w - 1 before it. Source: transformers 5.19, `masking_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.errors import ConfigError, Problem

Windows = tuple[int | None, ...]

FULL, SLIDING = "full_attention", "sliding_attention"


def windows_of_all(config: Mapping[str, Any], *, default: int | None) -> Windows:
    """The same window in every layer, or none: `sliding_window` alone says so.

    Args:
        config: Mapping of a Hugging Face `config.json`.
        default: Window that transformers takes if the config has no `sliding_window`; null there is no window.

    Raises:
        ConfigError: The window is no positive number, or `layer_types` says something else, which transformers'
            class does not read and vLLM's does.
    """
    window = config.get("sliding_window", default)
    kind = FULL if window is None else SLIDING
    problems = _window_problems(window)
    if other := sorted(set(config.get("layer_types") or ()) - {kind}):
        problems.append(
            Problem("config.json: layer_types", f"{kind} in every layer, as sliding_window says", ", ".join(other))
        )
    if problems:
        raise ConfigError("the model's attention windows can't be told", problems)
    return () if window is None else (window,) * config["num_hidden_layers"]


def windows_by_layer_type(config: Mapping[str, Any], *, window: int | None, default: list[str]) -> Windows:
    """The window in the layers that `layer_types` calls sliding, none in the others.

    Args:
        config: Mapping of a Hugging Face `config.json`.
        window: Tokens that a sliding layer sees; None if the config gives no window.
        default: Types of the layers if the config has no `layer_types`.

    Raises:
        ConfigError: A layer has another type, types are missing, or a layer slides without a window.
    """
    types = config.get("layer_types") or default
    problems = _window_problems(window)
    if len(types) != config["num_hidden_layers"]:
        expected = f"one for each of num_hidden_layers ({config['num_hidden_layers']})"
        problems.append(Problem("config.json: layer_types", expected, str(len(types))))
    if odd := sorted(set(types) - {FULL, SLIDING}):
        problems.append(Problem("config.json: layer_types", f"{FULL} or {SLIDING}", ", ".join(map(str, odd))))
    if SLIDING in types and window is None:
        problems.append(
            Problem(
                "config.json: sliding_window, use_sliding_window",
                f"a window, as layer_types has {SLIDING}",
                f"{config.get('sliding_window')!r}, {config.get('use_sliding_window')!r}",
            )
        )
    if problems:
        raise ConfigError("the model's attention windows can't be told", problems)
    return tuple(window if kind == SLIDING else None for kind in types) if SLIDING in types else ()


def no_windows(config: Mapping[str, Any]) -> Windows:
    """None in any layer, of a family that has no windows in transformers.

    Raises:
        ConfigError: `layer_types` asks for them; transformers fails or ignores it, and vLLM may not.
    """
    if odd := sorted(set(config.get("layer_types") or ()) - {FULL}):
        raise ConfigError(
            "the model's attention windows can't be told",
            [Problem("config.json: layer_types", f"{FULL} in every layer", ", ".join(odd))],
        )
    return ()


def layers_with_windows(config: Mapping[str, Any], *, default: int) -> int:
    """`max_window_layers`, which counts where `layer_types` are missing.

    Raises:
        ConfigError: It is no number.
    """
    number = config.get("max_window_layers", default)
    if not isinstance(number, int):
        problem = Problem("config.json: max_window_layers", "a number of layers", repr(number))
        raise ConfigError("the model's attention windows can't be told", [problem])
    return number


def qwen_windows(config: Mapping[str, Any]) -> Windows:
    """Windows of Qwen2 and Qwen3: `use_sliding_window` switches them on, in layers from `max_window_layers` on.

    Raises:
        ConfigError: As `windows_by_layer_type`.
    """
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = layers_with_windows(config, default=28)
    default = [
        SLIDING if window is not None and layer >= first else FULL for layer in range(config["num_hidden_layers"])
    ]
    return windows_by_layer_type(config, window=window, default=default)


def _window_problems(window: Any) -> list[Problem]:
    if window is None or (isinstance(window, int) and not isinstance(window, bool) and window > 0):
        return []
    return [Problem("config.json: sliding_window", "a positive number of tokens or null", repr(window))]
