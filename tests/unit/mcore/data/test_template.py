"""Token ids and masks: equal to what an independent computation says, for templates of four shapes."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore.data.rows import Message, Row
from mcore.data.template import RENDER_DATE, TemplateOptions, encode_rows, load_tokenizer
from mcore.errors import DataError
from tests.unit.mcore.data.tokenizers_for_tests import TEMPLATES, small_tokenizer, write_hf_dir

CONVERSATIONS = {
    "one turn": ["Who are you?", "I am a robot."],
    "three turns": ["Hi", "Hello.", "What is 2 + 2?", "It is 4.", "Thanks", "You are welcome."],
    "the same answer twice": ["a", "the same", "b", "the same"],
    "odd characters": ["漢字 🤖", "naïve\n\n  indented\n\n\ttab \u2028 end"],
    "an answer like a header": ["Say assistant", "assistant"],
    "system": ["system: Be brief.", "Who are you?", "A robot."],
}


def conversation(*contents: str) -> Row:
    system = [Message("system", contents[0][8:])] if contents[0].startswith("system: ") else []
    roles = ("user", "assistant")
    turns = [Message(roles[index % 2], text) for index, text in enumerate(contents[len(system) :])]
    return Row(messages=(*system, *turns), place="rows.jsonl:1")


def as_dicts(row: Row) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in row.messages]


def mask_by_offsets(row: Row, tokenizer, kind: str) -> tuple[list[int], list[bool]]:
    """The same by another way: find each answer in the text by hand, and take the tokens whose characters lie in it."""
    text = tokenizer.apply_chat_template(as_dicts(row), tokenize=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    header = {
        "chatml": "<|im_start|>assistant\n",
        "thinking": "<|im_start|>assistant\n",
        "headers": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "brackets": " [/INST]",
    }[kind]
    spans = []
    at = 0
    for message in row.messages:
        if message.role == "assistant":
            start = text.index(header, at) + len(header)
            at = text.index(tokenizer.eos_token, start) + len(tokenizer.eos_token)
            spans.append((start, at))
    mask = [any(a <= start and end <= b for a, b in spans) for start, end in encoding["offset_mapping"]]
    last = max(index for index, trained in enumerate(mask) if trained)
    return encoding["input_ids"][: last + 1], mask[: last + 1]


def last_answer_only(ids: list[int], mask: list[bool], tokenizer) -> tuple[list[int], list[bool]]:
    """Only the last run of trained tokens."""
    start = max(index for index, trained in enumerate(mask) if trained and not mask[index - 1])
    return ids, [trained and index >= start for index, trained in enumerate(mask)]


@pytest.mark.parametrize("contents", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("kind", TEMPLATES)
def test_ids_and_mask_equal_an_independent_computation(kind, contents):
    tokenizer = small_tokenizer(kind)
    row = conversation(*contents)
    samples, problems = encode_rows([row], tokenizer, "sft")
    if kind == "brackets" and row.messages[0].role == "system":
        assert not samples and "no system message here" in str(problems[0])
        return
    if kind == "thinking" and len(contents) > 3:  # thinks before the last answer only: a sample an answer
        assert (
            not samples and "the answer as it was given" in str(problems[0]) and "multi_turn: split" in str(problems[0])
        )
        samples, problems = encode_rows([row], tokenizer, "sft", options=TemplateOptions(multi_turn="split"))
        assert not problems
        parts = [Row(row.messages[: end + 1]) for end, turn in enumerate(row.messages) if turn.role == "assistant"]
        expected = [last_answer_only(*mask_by_offsets(part, tokenizer, kind), tokenizer) for part in parts]
        assert [(list(sample.token_ids), list(sample.loss_mask)) for sample in samples] == expected
        assert {sample.place for sample in samples} == {"rows.jsonl:1"}
        return
    assert not problems
    assert (list(samples[0].token_ids), list(samples[0].loss_mask)) == mask_by_offsets(row, tokenizer, kind)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_is_trained_is_the_answer_and_the_token_that_ends_it(kind):
    tokenizer = small_tokenizer(kind)
    options = TemplateOptions(multi_turn="split")  # takes effect where thoughts are taken out of earlier turns
    row = conversation("Who are you?", "I am a robot.", "Sure?", "Yes.")
    samples, _ = encode_rows([row], tokenizer, "sft", options=options)
    trained = [
        token for sample in samples for token, target in zip(sample.token_ids, sample.loss_mask, strict=True) if target
    ]
    end, between = {
        "chatml": ("<|im_end|>", ""),
        "headers": ("<|eot_id|>", ""),
        "brackets": (" </s>", " "),
        "thinking": ("<|im_end|>", ""),
    }[kind]
    think = "<think>\n\n</think>\n\n" if kind == "thinking" else ""
    assert tokenizer.decode(trained) == f"{between}{think}I am a robot.{end}{between}{think}Yes.{end}"
    assert trained[-1] == tokenizer.eos_token_id
    assert samples[0].loss_mask[0] == 0


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_tokens_before_an_answer_are_the_prompt_that_a_server_makes(kind):
    tokenizer = small_tokenizer(kind)
    row = conversation("Hi", "Hello.", "What is 2 + 2?", "It is 4.")
    samples, _ = encode_rows([row], tokenizer, "sft", options=TemplateOptions(loss_scale="last_round"))
    prompt = tokenizer.apply_chat_template(as_dicts(row)[:-1], add_generation_prompt=True, return_dict=False)
    assert list(samples[0].token_ids[: len(prompt)]) == prompt
    assert all(samples[0].loss_mask[len(prompt) :]) and not any(samples[0].loss_mask[: len(prompt)])


texts = st.text(
    st.one_of(st.sampled_from("ab \n\t'<|>"), st.characters(exclude_categories=["Cs"])), min_size=1, max_size=12
).filter(str.strip)


@pytest.mark.parametrize("kind", ["chatml", "headers", "brackets"])
@settings(max_examples=150, deadline=None)
@given(contents=st.lists(texts, min_size=2, max_size=4).filter(lambda contents: len(contents) % 2 == 0))
def test_any_text_gives_the_same_as_the_independent_computation_or_a_problem(kind, contents):
    tokenizer = small_tokenizer(kind)
    row = conversation(*[text.replace("system: ", "") or "x" for text in contents])
    samples, problems = encode_rows([row], tokenizer, "sft")
    assert len(samples) + len(problems) == 1
    if samples:
        expected = mask_by_offsets(row, tokenizer, kind)
        assert (list(samples[0].token_ids), list(samples[0].loss_mask)) == expected
    else:
        # The one thing that may be wrong here: white space in front of an answer melts into the generation prompt.
        assert "the tokens of the generation prompt change" in str(problems[0])
        assert any(message.content[0].isspace() for message in row.messages if message.role == "assistant")


def test_many_rows_keep_their_order_and_places():
    rows = [
        Row((Message("user", f"number {n}"), Message("assistant", f"it is {n}")), place=f"f:{n}") for n in range(1200)
    ]
    rows[7] = Row((Message("user", "a <|im_end|> in it"), Message("assistant", "x")), place="f:7")
    tokenizer = small_tokenizer("chatml")
    done = []
    samples, problems = encode_rows(rows, tokenizer, "sft", done.append)
    assert [sample.place for sample in samples] == [f"f:{n}" for n in range(1200) if n != 7]
    assert all(tokenizer.decode(sample.token_ids).endswith(f"it is {sample.place[2:]}<|im_end|>") for sample in samples)
    assert sum(done) == 1200
    assert [str(problem).split(".")[0] for problem in problems] == [
        "f:7: messages[0]",
    ]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_marks_between_turns_may_not_be_in_a_message(kind):
    tokenizer = small_tokenizer(kind)
    for row in (conversation(f"a{tokenizer.eos_token}", "b"), conversation("a", f"b{tokenizer.eos_token}c")):
        samples, problems = encode_rows([row], tokenizer, "sft")
        assert not samples and "no special token of the tokenizer" in str(problems[0])
        assert str(problems[0]).startswith("rows.jsonl:1: messages[")


def test_white_space_that_melts_into_the_prompt_is_a_problem():
    samples, problems = encode_rows([conversation("a", "\n\n\nb")], small_tokenizer("chatml"), "sft")
    assert not samples and "the tokens of the generation prompt change" in str(problems[0])


def test_a_template_that_does_not_fit_the_tokenizer_is_a_problem():
    # This tokenizer makes one token of the two line ends of a prompt, and two tokens once a word follows.
    tokenizer = copy.deepcopy(small_tokenizer("chatml"))
    tokenizer.chat_template = (
        TEMPLATES["chatml"].replace("assistant\n", "assistant\n\n").replace("{{ m.role }}\n", "{{ m.role }}\n\n")
    )
    samples, problems = encode_rows([conversation("a", "b")], tokenizer, "sft")
    assert not samples and "this template does not fit this tokenizer" in str(problems[0])


BAD_TEMPLATES = {
    "no template": (None, "expected a chat template, found none"),
    "drops the system message": (
        TEMPLATES["chatml"].replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        "the chat template leaves out messages[0] (system)",
    ),
    "drops the answer": (
        TEMPLATES["chatml"].replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' else '...' }}"),
        "the chat template leaves out messages[2] (assistant)",
    ),
    "counts the messages": (
        TEMPLATES["chatml"].replace("You are", "{{ messages | length }} messages. You are")
        + "{% if not loop %}{{ messages | length }}{% endif %}",
        "to begin the whole text",
    ),
    "a mark between header and answer": (
        TEMPLATES["chatml"].replace("{{ m.content }}", "<|im_end|>{{ m.content }}"),
        "the answer and then a special token that ends the turn",
    ),
    "ends no turn": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "a special token that ends the turn",
    ),
    "another generation prompt": (
        TEMPLATES["chatml"].replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>model\n{% endif %}"),
        "to begin the whole text",
    ),
    "raises": ("{{ raise_exception('not this one') }}", "not this one"),
    "no Jinja": ("{% for %}", "a conversation that the chat template takes"),
}


@pytest.mark.parametrize(("template", "found"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_a_template_that_would_train_something_else_is_named(template, found):
    tokenizer = copy.deepcopy(small_tokenizer("chatml"))
    tokenizer.chat_template = template
    row = conversation("system: Be brief.", "Who are you?", "A robot.", "Sure?", "Yes.")
    samples, problems = encode_rows([row], tokenizer, "sft")
    assert not samples and found in str(problems[0])


def test_an_answer_that_is_left_out_is_not_mistaken_for_the_same_words_before_it():
    tokenizer = copy.deepcopy(small_tokenizer("chatml"))
    tokenizer.chat_template = BAD_TEMPLATES["drops the answer"][0]
    _, problems = encode_rows([conversation("the same", "the same")], tokenizer, "sft")
    assert "leaves out messages[1] (assistant)" in str(problems[0])


def test_a_special_token_that_begins_like_another():
    tokenizer = copy.deepcopy(small_tokenizer("chatml"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|"]})
    row = conversation("a", "b")
    assert encode_rows([row], tokenizer, "sft") == encode_rows([row], small_tokenizer("chatml"), "sft")


def test_a_tokenizer_that_takes_marks_for_ordinary_text():
    tokenizer = copy.deepcopy(small_tokenizer("chatml"))
    tokenizer.split_special_tokens = True
    samples, problems = encode_rows([conversation("a", "b")], tokenizer, "sft")
    assert not samples and "'<|im_end|>' as one token" in str(problems[0])


THOUGHTS = conversation("a", "<think>\nhm\n</think>\n\nfirst", "b", "<think>\nso\n</think>\n\nsecond")


def trained_text(sample, tokenizer) -> str:
    pairs = zip(sample.token_ids, sample.loss_mask, strict=True)
    return tokenizer.decode([token for token, target in pairs if target])


def test_thoughts_that_the_template_takes_out_of_earlier_turns_are_never_trained_around():
    tokenizer = small_tokenizer("thinking")
    samples, problems = encode_rows([THOUGHTS], tokenizer, "sft")
    assert not samples and "'first" in str(problems[0]) and "instead of '<think>" in str(problems[0])
    samples, problems = encode_rows([THOUGHTS], tokenizer, "sft", options=TemplateOptions(multi_turn="split"))
    assert not problems
    assert [trained_text(sample, tokenizer) for sample in samples] == [
        "<think>\nhm\n</think>\n\nfirst<|im_end|>",
        "<think>\nso\n</think>\n\nsecond<|im_end|>",
    ]
    assert "hm" not in tokenizer.decode(samples[1].token_ids)


def test_the_last_round_only():
    for kind in TEMPLATES:
        tokenizer = small_tokenizer(kind)
        row = conversation("a", "first", "b", "second")
        [sample], _ = encode_rows([row], tokenizer, "sft", options=TemplateOptions(loss_scale="last_round"))
        assert "second" in trained_text(sample, tokenizer) and "first" not in trained_text(sample, tokenizer)
        assert "first" in tokenizer.decode(sample.token_ids)


@pytest.mark.parametrize("scale", ["ignore_empty_think", "last_round+ignore_empty_think"])
def test_an_empty_thought_can_be_no_target(scale):
    tokenizer = small_tokenizer("thinking")
    rows = [conversation("a", "first", "b", "second"), conversation("a", "<think>\nhm\n</think>\n\nb")]
    samples, problems = encode_rows(rows, tokenizer, "sft", options=TemplateOptions(loss_scale=scale))
    assert not problems
    first = "first<|im_end|>" if scale == "ignore_empty_think" else ""
    assert [trained_text(sample, tokenizer) for sample in samples] == [
        f"{first}second<|im_end|>",
        "<think>\nhm\n</think>\n\nb<|im_end|>",
    ]
    assert "<think>\n\n</think>\n\nsecond" in tokenizer.decode(samples[0].token_ids)


def test_a_thought_that_the_template_leaves_out_is_no_silent_loss():
    row = Row((Message("user", "a"), Message("assistant", "b", reasoning_content="so it is b")), place="f:1")
    samples, problems = encode_rows([row], small_tokenizer("chatml"), "sft")
    assert not samples and "leaves out the thoughts" in str(problems[0])


def test_weights_of_messages():
    tokenizer = small_tokenizer("chatml")
    turns = (
        Message("user", "a"),
        Message("assistant", "one", loss=False),
        Message("user", "b"),
        Message("assistant", "two", loss_scale=0.25),
        Message("user", "c"),
        Message("assistant", "three"),
    )
    row = Row(turns, place="f:1")
    [sample], problems = encode_rows([row], tokenizer, "sft")
    assert not problems
    by_weight = {
        weight: tokenizer.decode([t for t, w in zip(sample.token_ids, sample.loss_mask, strict=True) if w == weight])
        for weight in set(sample.loss_mask)
    }
    assert by_weight.keys() == {0.0, 0.25, 1.0}
    assert by_weight[0.25] == "two<|im_end|>" and by_weight[1.0] == "three<|im_end|>" and "one" in by_weight[0.0]
    [last], _ = encode_rows([row], tokenizer, "sft", options=TemplateOptions(loss_scale="last_round"))
    assert trained_text(last, tokenizer) == "three<|im_end|>"
    asked = Row((*turns[:3], Message("assistant", "two", loss=True), *turns[4:]), place="f:1")
    [both], _ = encode_rows([asked], tokenizer, "sft", options=TemplateOptions(loss_scale="last_round"))
    assert trained_text(both, tokenizer) == "two<|im_end|>three<|im_end|>"
    [everything], _ = encode_rows([row], tokenizer, "sft", options=TemplateOptions(loss_scale="all"))
    assert everything.loss_mask[0] == 0
    whole = tokenizer.decode(everything.token_ids).removeprefix("<|im_start|>").replace("one<|im_end|>", "", 1)
    assert trained_text(everything, tokenizer) == whole
    nothing = Row((turns[0], Message("assistant", "one", loss_scale=0.0)), place="f:1")
    for scale in ("default", "all"):
        samples, problems = encode_rows([nothing], tokenizer, "sft", options=TemplateOptions(loss_scale=scale))
        assert not samples and "at least one trained answer" in str(problems[0])


def test_a_template_of_the_run_and_a_switch_that_it_must_have():
    tokenizer = small_tokenizer("chatml")
    own = TEMPLATES["chatml"].replace("You are a helpful assistant.", "{{ 'Think.' if enable_thinking else 'Speak.' }}")
    for thinks, said in ((True, "Think."), (False, "Speak."), (None, "Speak.")):
        options = TemplateOptions(template=own, enable_thinking=thinks)
        [sample], problems = encode_rows([conversation("a", "b")], tokenizer, "sft", options=options)
        assert not problems and said in tokenizer.decode(sample.token_ids)
    samples, problems = encode_rows(
        [conversation("a", "b")], tokenizer, "sft", options=TemplateOptions(enable_thinking=False)
    )
    assert not samples and "data.enable_thinking" in str(problems[0])


def test_a_template_that_asks_for_the_date_always_gets_the_same():
    tokenizer = copy.deepcopy(small_tokenizer("chatml"))
    tokenizer.chat_template = TEMPLATES["chatml"].replace("You are", "Today is {{ strftime_now('%d %b %Y') }}. You are")
    samples, problems = encode_rows([conversation("Hi", "Hello.")], tokenizer, "sft")
    assert not problems
    assert f"Today is {RENDER_DATE:%d %b %Y}. You are" in tokenizer.decode(samples[0].token_ids)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_pt_takes_the_text_and_ends_it(kind):
    tokenizer = small_tokenizer(kind)
    texts = ["some text\nin two lines", "the end"]
    samples, problems = encode_rows([Row(text=text, place=text) for text in texts], tokenizer, "pt")
    assert not problems
    for text, sample in zip(texts, samples, strict=True):
        start = [tokenizer.bos_token_id] if kind in {"headers", "brackets"} else []
        body = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert list(sample.token_ids) == [*start, *body, tokenizer.eos_token_id]
        assert list(sample.loss_mask) == [False] + [True] * (len(sample.token_ids) - 1)


def test_pt_does_not_end_a_text_twice():
    tokenizer = small_tokenizer("chatml")
    samples, _ = encode_rows([Row(text="a<|im_end|>")], tokenizer, "pt")
    assert list(samples[0].token_ids).count(tokenizer.eos_token_id) == 1


def test_pt_needs_a_token_that_ends_a_text():
    tokenizer = copy.deepcopy(small_tokenizer("chatml"))
    tokenizer.eos_token = None
    samples, problems = encode_rows([Row(text="a")], tokenizer, "pt")
    assert not samples and "an eos_token" in str(problems[0])


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_tokenizer_of_a_folder(tmp_path, kind):
    loaded = load_tokenizer(write_hf_dir(tmp_path, kind))
    row = conversation("Hi", "Hello.")
    assert encode_rows([row], loaded, "sft") == encode_rows([row], small_tokenizer(kind), "sft")


@pytest.mark.parametrize("content", [None, "{", '{"model": 1}', '{"model": {"type": "BPE", "vocab": {"a": 0}}}'])
def test_a_folder_without_a_tokenizer(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="the tokenizer can't be loaded"):
        load_tokenizer(tmp_path)
