import json
from itertools import pairwise

import pytest

from mcore.errors import ConfigError
from mcore.verify.prompts import TEXTS, prompt_set, seeded_ids


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A byte-level tokenizer of 258 ids, trained on nothing: every text is its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {"<s>": 256, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("vocab_size", [50, 96, 97, 151_936])
def test_seeded_ids_cover_the_whole_vocabulary_evenly(vocab_size):
    ids = seeded_ids(0, vocab_size=vocab_size, num_tokens=96)
    assert len(ids) == 96
    assert min(ids) == 0
    assert max(ids) == vocab_size - 1
    assert list(ids) != sorted(ids)
    ordered = sorted(ids)
    assert max(b - a for a, b in pairwise(ordered)) <= 2 * vocab_size / 96 + 1


def test_seeded_ids_are_the_same_everywhere():
    assert seeded_ids(3, vocab_size=1000, num_tokens=8) == (999, 742, 827, 319, 391, 0, 547, 200)
    assert seeded_ids(4, vocab_size=1000, num_tokens=8) != seeded_ids(3, vocab_size=1000, num_tokens=8)


def test_a_folder_without_tokenizer_gets_bare_ids(tmp_path):
    prompts = prompt_set(tmp_path, vocab_size=512, num_prompts=3, max_prompt_tokens=16)
    assert prompts.source == "seeded ids only"
    assert [prompt.name for prompt in prompts.prompts] == ["seeded_0", "seeded_1", "seeded_2"]
    assert {len(prompt.token_ids) for prompt in prompts.prompts} == {16}
    assert len({prompt.token_ids for prompt in prompts.prompts}) == 3


def test_texts_are_tokenised_by_the_folder_and_cut(tokenizer_folder):
    prompts = prompt_set(tokenizer_folder, vocab_size=258, num_prompts=4, max_prompt_tokens=40)
    assert prompts.source == "texts and seeded ids"
    assert [prompt.name for prompt in prompts.prompts] == ["seeded_0", "scripts", "code", "prose"]
    assert {len(prompt.token_ids) for prompt in prompts.prompts} == {40}
    assert len(prompts.digest) == 64
    assert prompts.digest != prompt_set(tokenizer_folder, vocab_size=258, num_prompts=4, max_prompt_tokens=41).digest


def test_more_prompts_than_texts(tokenizer_folder):
    prompts = prompt_set(tokenizer_folder, vocab_size=258, num_prompts=len(TEXTS) + 3, max_prompt_tokens=9).prompts
    assert [prompt.name for prompt in prompts][-3:] == ["repetition", "seeded_1", "seeded_2"]
    assert len(prompts) == len(TEXTS) + 3


def test_one_prompt_covers_the_vocabulary(tokenizer_folder):
    prompts = prompt_set(tokenizer_folder, vocab_size=258, num_prompts=1, max_prompt_tokens=9)
    assert [prompt.name for prompt in prompts.prompts] == ["seeded_0"]
    assert prompts.source == "seeded ids only"


def test_a_tokenizer_of_another_model_is_refused(tokenizer_folder):
    with pytest.raises(ConfigError, match="ids below 100") as caught:
        prompt_set(tokenizer_folder, vocab_size=100, num_prompts=3, max_prompt_tokens=40)
    assert len(caught.value.problems) == 2


def test_a_damaged_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ConfigError, match="can't be loaded"):
        prompt_set(tmp_path, vocab_size=512, num_prompts=2, max_prompt_tokens=16)
