"""Sequence classifiers and reward models: a family's decoder with a small head in the vocabulary head's place.

transformers computes the head's logits at every position and takes those of the last token that is no padding. A
reward model is a classifier with one label.

Source: transformers 5.19 `modeling_layers.py`, `GenericForSequenceClassification`, and `configuration_utils.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family
from mcore.errors import ConfigError, Problem

SUFFIX = "ForSequenceClassification"
"""End of the names of architectures that have such a head."""
HEAD = "output_layer.weight"


def classifier_of(family: Family, architecture: str) -> Family:
    """The family of a classifier, made of the language model's.

    Args:
        family: Of the language model with the same decoder.
        architecture: Class name of the classifier.
    """

    def sizes(config: Mapping[str, Any]) -> Mapping[str, Any]:
        # There is no vocabulary head that could share the embedding's weight, nor further-token layers.
        return {**family.sizes(config), "tied": False, "num_mtp_layers": 0, "num_labels": num_labels(config)}

    def features(config: Mapping[str, Any]) -> Features:
        # What caps logits of the vocabulary is no part of a classifier.
        return dataclasses.replace(family.features(config), num_labels=num_labels(config), logit_softcap=None)

    return dataclasses.replace(
        family,
        hf_architecture=architecture,
        rules=(
            *(rule for rule in family.rules if rule.mcore != HEAD),
            Copy(HEAD, "num_labels hidden", "score.weight"),
        ),
        tied_hf=tuple(pair for pair in family.tied_hf if pair[0] != "lm_head.weight"),
        sizes=sizes,
        features=features,
    )


def num_labels(config: Mapping[str, Any]) -> int:
    """Labels of a classifier: as many as `id2label` names; without it `num_labels`, or two.

    Raises:
        ConfigError: They are no positive number, or the two keys differ, of which transformers only warns.
    """
    names, number = config.get("id2label"), config.get("num_labels")
    problems = []
    if names is not None and (not isinstance(names, Mapping) or not names):
        problems.append(Problem("config.json: id2label", "a mapping from numbers to names, or null", repr(names)))
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        problems.append(Problem("config.json: num_labels", "a positive integer or null", repr(number)))
    if not problems and names and number is not None and len(names) != number:
        problems.append(Problem("config.json: num_labels", f"{len(names)}, as id2label has", str(number)))
    if problems:
        raise ConfigError("the classifier's labels can't be counted", problems)
    return len(names) if names else number or 2
