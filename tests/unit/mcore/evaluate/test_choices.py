"""Choices as tokens behind their prompt, and which one is found most probable."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs.schema.suite import Case
from mcore.evaluate.choices import choose, encode_choices
from mcore.evaluate.suites import Question

WORDS = ["<unk>", "<s>", "</s>", "user", "assistant", "sky", "is", "blue", "red", "very", "The"]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<s> {{ message.role }} {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
CHOICES = ("blue", "very red")


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def question(role="user", **fields):
    case = Case(prompt="sky", choices=CHOICES, **fields)
    return Question("all", 1, case, [{"role": role, "content": "sky"}])


def words_of(ids):
    return " ".join(WORDS[token_id] for token_id in ids)


def test_a_choice_goes_on_from_the_prompt_or_from_what_was_said(tokenizer):
    (plain, said), problems = encode_choices(
        [question(), question(answer_prefix="The sky is")], tokenizer, max_model_len=16
    )
    assert problems == []
    assert [words_of(one.token_ids) for one in plain.choices] == [
        "<s> user sky </s> <s> assistant blue",
        "<s> user sky </s> <s> assistant very red",
    ]
    assert {words_of(one.token_ids[: one.num_before]) for one in plain.choices} == {"<s> user sky </s> <s> assistant"}
    assert words_of(said.choices[1].token_ids[said.choices[1].num_before - 3 :]) == "The sky is very red"


def test_a_choice_that_is_too_long_is_told_and_a_refused_question_left_to_the_others_check(tokenizer):
    encoded, problems = encode_choices([question(), question("system")], tokenizer, max_model_len=8)
    assert [(problem.subject, problem.found) for problem in problems] == [("question all 1", "8")]
    assert len(encoded) == 1


@pytest.mark.parametrize(
    ("normalised", "blue", "very", "red", "chosen"),
    [
        (False, -2.0, -1.0, -1.5, "blue"),
        (True, -2.0, -1.0, -1.5, "very red"),
        (False, -3.0, -1.0, -1.0, "very red"),
        (False, -2.0, -1.0, -1.0, ""),  # as probable as each other
    ],
)
def test_the_most_probable_is_chosen(tokenizer, normalised, blue, very, red, chosen):
    (one,), _ = encode_choices([question(length_normalised=normalised)], tokenizer, max_model_len=16)
    before = [-9.0] * 5  # the prompt's own tokens from the second on, which are not counted
    answer, scores = choose(one, [[*before, blue], [*before, very, red]])
    assert answer.text == chosen
    assert scores == {"blue": blue, "very red": (very + red) / (2 if normalised else 1)}
    assert one.question.case.failures(answer.text) == ([] if chosen == "blue" else ["is not 'blue'"])
