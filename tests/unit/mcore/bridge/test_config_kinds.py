from __future__ import annotations

import json

import pytest

from mcore.bridge import families
from mcore.bridge.config_kinds import INTEGERS, LISTS, MAPPINGS, NUMBERS, SWITCHES, WORDS, kind_problems
from tests.tiny_classifiers import CLASSIFIERS
from tests.tiny_dense import DENSE
from tests.tiny_latent import LATENT_MODELS
from tests.tiny_models import MODELS, SIZES
from tests.tiny_moe import MOE
from tests.tiny_normed import NORMED

MODELS_OF_ALL_FAMILIES = {**MODELS, **DENSE, **CLASSIFIERS, **NORMED, **LATENT_MODELS, **MOE}
ALL = (INTEGERS, NUMBERS, SWITCHES, WORDS, frozenset(LISTS), MAPPINGS)


def config_of(name):
    model_class, config_class, options = MODELS_OF_ALL_FAMILIES[name]
    config = config_class(**{**SIZES, **options}).to_dict() | {"architectures": [model_class.__name__]}
    return json.loads(json.dumps(config, default=str))


@pytest.mark.parametrize("name", MODELS_OF_ALL_FAMILIES)
def test_no_config_of_transformers_is_refused(name):
    assert kind_problems(config_of(name)) == []


def test_a_key_has_one_kind():
    keys = [key for kind in ALL for key in kind]
    assert len(keys) == len(set(keys))


def test_every_key_that_a_family_reads_has_a_kind():
    """Asked of the families themselves: they are given a config that notes what is read."""

    class Noting(dict):
        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    read: set[str] = set()
    for name in MODELS_OF_ALL_FAMILIES:
        config = Noting(config_of(name))
        family = families.family_of_config(config)
        families.dims_of(config)
        family.transformer_config(config)
        family.features(config)
    known = frozenset().union(*ALL)
    assert len(read) > 40
    assert read - known - {"id2label", "auto_map"} == set()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"hidden_size": "64"},
            "config.json: hidden_size: expected an integer from 0 to 2147483647, or null, found '64'",
        ),
        ({"hidden_size": True}, "config.json: hidden_size"),
        ({"hidden_size": 2**31}, "config.json: hidden_size"),
        ({"num_hidden_layers": 1025}, "an integer from 0 to 1024"),
        ({"pad_token_id": -2}, "an integer from -1 to"),
        ({"rms_norm_eps": True}, "expected a number"),
        ({"rope_theta": 10**19}, "expected a number"),
        ({"tie_word_embeddings": 1}, "expected true or false"),
        ({"hidden_act": ["silu"]}, "expected a text"),
        ({"mlp_only_layers": ["1"]}, "expected a list of numbers"),
        ({"rope_scaling": "yarn"}, "expected an object"),
        ({"rope_scaling": {"factor": "2"}}, "config.json: rope_scaling.factor: expected a number"),
        ({"rope_parameters": {"full_attention": {"factor": "2"}}}, "rope_parameters.full_attention.factor"),
        ({"text_config": {"hidden_size": 1.0}}, "config.json: text_config.hidden_size"),
    ],
)
def test_a_value_of_a_wrong_kind(config, expected):
    (problem,) = kind_problems(config)
    assert expected in str(problem)


def test_what_is_not_read_may_be_anything():
    config = {
        "vision_config": {"hidden_size": "x"},
        "quantization_config": {"factor": "x"},
        "odd": [],
        "head_dim": None,
    }
    assert kind_problems(config) == []
