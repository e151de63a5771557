import pytest

from mcore.verify.lengths import unreached_lengths
from mcore.verify.mutants.tiny_models import tiny_config

CLASSES = {"mistral": "MistralForCausalLM", "phi3": "Phi3ForCausalLM", "llama": "LlamaForCausalLM"}
CLASSES["ministral3"] = "Ministral3ForCausalLM"


@pytest.mark.parametrize(
    ("family", "num_tokens", "expected"),
    [
        ("mistral", 9, ("the window of 9 tokens",)),
        ("mistral", 10, ()),
        ("phi3", 16, ("the longrope frequencies beyond 16 tokens",)),
        ("phi3", 17, ()),
        ("llama", 2, ()),
        ("ministral3", 16, ("queries that grow beyond 16 tokens",)),
        ("ministral3", 17, ()),
    ],
)
def test_what_prompts_are_too_short_for_is_named(family, num_tokens, expected):
    config = tiny_config(family, sliding_window=9).to_dict() if family == "mistral" else tiny_config(family).to_dict()
    assert unreached_lengths(config | {"architectures": [CLASSES[family]]}, num_tokens) == expected
