"""Which layers are built, and what a backend refuses."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mcore.backend.specs import engine_lacks, refuse_what_engine_lacks, resolve_backend
from mcore.bridge.features import Features
from mcore.errors import ConfigError


def test_auto_is_torch_without_cuda() -> None:
    assert resolve_backend("auto") == resolve_backend("torch") == "torch"


def test_auto_is_torch_for_what_engine_layers_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has both; a real one is in tests/gpu."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    gemma, llama = Features(windows=(4, None), embedding_scale=8.0), Features(logit_softcap=30.0)
    assert engine_lacks(gemma) == ["windows"]
    assert resolve_backend("auto") == resolve_backend("auto", llama) == "transformer_engine"
    assert resolve_backend("auto", gemma) == "torch"
    assert resolve_backend("transformer_engine", gemma) == "transformer_engine"  # refused where layers are built


def test_transformer_engine_is_refused_with_everything_it_lacks() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_backend("transformer_engine")
    assert [problem.subject for problem in caught.value.problems] == [
        "CUDA",
        "transformer_engine",
        "Set backend: torch.",
    ]


def test_transformer_engine_is_refused_for_what_it_can_not_build_all_at_once() -> None:
    features = Features(windows=(4, None), attention_softcap=50.0, logit_softcap=30.0, norm_placement="around")
    with pytest.raises(ConfigError) as caught:
        refuse_what_engine_lacks(features)
    assert [problem.subject for problem in caught.value.problems] == [
        "feature windows",
        "feature attention_softcap",
        "feature norm_placement",
        "Set backend: torch.",
    ]


def test_transformer_engine_builds_what_is_no_part_of_a_layer() -> None:
    refuse_what_engine_lacks(Features(logit_softcap=30.0, embedding_scale=8.0, num_labels=2))
