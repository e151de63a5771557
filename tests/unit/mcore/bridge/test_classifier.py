from __future__ import annotations

import pytest
from transformers import LlamaConfig

from mcore.bridge.families import SUPPORTED, dims_of, family_of, family_of_config
from mcore.bridge.families.classifier import SUFFIX, num_labels
from mcore.errors import ConfigError
from tests.tiny_classifiers import CLASSIFIERS
from tests.tiny_models import tiny_hf_model


@pytest.mark.parametrize("labels", [{}, {"num_labels": 1}, {"num_labels": 7}, {"id2label": {"0": "no", "1": "yes"}}])
@pytest.mark.parametrize("as_saved", [LlamaConfig.to_dict, LlamaConfig.to_diff_dict])
def test_labels_are_counted_as_transformers_counts_them(labels, as_saved):
    config = LlamaConfig(**labels)
    assert num_labels(as_saved(config)) == config.num_labels
    assert num_labels(labels) == config.num_labels


@pytest.mark.parametrize(
    ("config", "subject"),
    [
        ({"num_labels": 0}, "num_labels"),
        ({"num_labels": True}, "num_labels"),
        ({"num_labels": "3"}, "num_labels"),
        ({"num_labels": 3, "id2label": {"0": "no", "1": "yes"}}, "num_labels"),
        ({"id2label": ["no", "yes"]}, "id2label"),
        ({"id2label": {}}, "id2label"),
    ],
)
def test_labels_that_can_not_be_counted_are_refused(config, subject):
    with pytest.raises(ConfigError) as caught:
        num_labels(config)
    assert [problem.subject for problem in caught.value.problems] == [f"config.json: {subject}"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_has_a_head_of_its_own_and_no_other(name):
    model, config = tiny_hf_model(name)
    family, dims = family_of_config(config), dims_of(config)
    assert not dims.tied
    assert dims.size("num_labels") == model.config.num_labels == family.features(config).num_labels
    heads = [rule for rule in family.rules if rule.mcore == "output_layer.weight"]
    assert [rule.hf for rule in heads] == ["score.weight"]
    assert heads[0].mcore_shape(dims) == tuple(model.score.weight.shape)


@pytest.mark.parametrize("architecture", [name for name in SUPPORTED if name.endswith(SUFFIX)])
def test_a_classifier_is_its_language_model_but_for_the_head(architecture):
    language_model = next(
        name for name, module in SUPPORTED.items() if module == SUPPORTED[architecture] and not name.endswith(SUFFIX)
    )
    own, other = family_of(architecture), family_of(language_model)
    assert own.rules[:-1] == tuple(rule for rule in other.rules if rule.mcore != "output_layer.weight")
    assert own.hf_architecture == architecture


def test_what_caps_logits_of_a_vocabulary_is_no_part_of_a_classifier():
    config = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "num_hidden_layers": 2}
    config |= {"hidden_size": 64, "query_pre_attn_scalar": 8, "sliding_window": 4, "num_labels": 1}
    language_model = family_of("Gemma2ForCausalLM").features(config)
    reward = family_of("Gemma2ForSequenceClassification").features(config)
    assert (language_model.logit_softcap, reward.logit_softcap) == (30.0, None)
    assert reward.attention_softcap == language_model.attention_softcap == 50.0


def test_every_classifier_has_a_tiny_model():
    """Each of them is held against transformers in test_heads.py and through the files in test_verify_dense.py."""
    tiny = {model_class.__name__ for model_class, _, _ in CLASSIFIERS.values()}
    assert tiny == {name for name in SUPPORTED if name.endswith(SUFFIX)}
