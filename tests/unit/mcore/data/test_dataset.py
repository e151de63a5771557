"""Samples of a run: what training sees when, and what is refused."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema.data import DataConfig
from mcore.data.dataset import TokenDataset
from mcore.data.prepare.build import build_datasets
from mcore.data.prepare.length import fit_length
from mcore.data.template import Sample
from mcore.errors import DataError
from tests.unit.mcore.data.tokenizers_for_tests import small_tokenizer, write_hf_dir


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return write_hf_dir(tmp_path_factory.mktemp("hf"), "chatml")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    answers = ["short", "a longer answer about the world", "the small red model learns to answer " * 4]
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"n {n}"}, {"role": "assistant", "content": answer}]})
            + "\n"
            for n, answer in enumerate(answers)
        )
    )
    return path


def fake_samples(num_samples: int) -> list[Sample]:
    return [Sample(list(range(n % 5 + 2)), [False] + [True] * (n % 5 + 1), f"f:{n}") for n in range(num_samples)]


def test_samples_come_back_as_they_went_in():
    samples = fake_samples(17)
    dataset = TokenDataset(samples)
    assert len(dataset) == 17
    assert [(list(s.token_ids), list(s.loss_mask), s.place) for s in dataset] == [
        (list(s.token_ids), list(s.loss_mask), s.place) for s in samples
    ]
    assert dataset[-1].place == "f:16" and [s.place for s in dataset[3:5]] == ["f:3", "f:4"]
    assert dataset.num_tokens == sum(len(s.token_ids) for s in samples)
    assert dataset.num_trained_tokens == sum(sum(s.loss_mask) for s in samples)
    assert dataset.max_tokens == 6
    with pytest.raises(IndexError):
        dataset[17]


@given(
    st.integers(min_value=1, max_value=30),
    st.integers(min_value=1, max_value=12),
    st.integers(min_value=0, max_value=1000),
)
def test_steps_read_every_sample_once_an_epoch_whatever_the_batch(num_samples, batch_size, seed):
    dataset = TokenDataset(fake_samples(num_samples), seed=seed, shuffle=True)
    iterations = dataset.iterations(3, batch_size)
    assert (iterations - 1) * batch_size < 3 * num_samples <= iterations * batch_size
    seen = [sample.place for step in range(iterations) for sample in dataset.batch(step * batch_size, batch_size)]
    for epoch in range(3):
        places = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert places == [f"f:{index}" for index in dataset.order(epoch)]
        assert set(Counter(places).values()) == {1} and len(places) == num_samples


def test_what_a_step_reads_does_not_depend_on_where_training_began():
    one, other = (TokenDataset(fake_samples(23), seed=3, shuffle=True) for _ in range(2))
    through = [one.sample_index(n) for n in range(100)]
    assert [other.sample_index(n) for n in reversed(range(100))] == through[::-1]
    assert through[:23] != through[23:46]


def test_without_shuffle_the_order_is_that_of_the_files():
    dataset = TokenDataset(fake_samples(4))
    assert [dataset.sample_index(n) for n in range(6)] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("num_epochs", "num_samples", "batch_size", "expected"),
    [(1, 16, 16, 1), (1, 17, 16, 2), (0.1, 30, 1, 3), (0.01, 30, 16, 1), (2.5, 10, 5, 5), (3, 1, 16, 1)],
)
def test_steps_of_epochs(num_epochs, num_samples, batch_size, expected):
    assert TokenDataset(fake_samples(num_samples)).iterations(num_epochs, batch_size) == expected


def test_an_empty_dataset_has_nothing_to_read():
    dataset = TokenDataset([])
    assert (len(dataset), dataset.num_tokens, dataset.max_tokens) == (0, 0, 0)
    with pytest.raises(DataError, match="no samples"):
        dataset.sample_index(0)


def test_the_fingerprint_tells_any_change():
    samples = fake_samples(6)
    other_id = [Sample([9, *samples[0].token_ids[1:]], samples[0].loss_mask), *samples[1:]]
    other_mask = [Sample(samples[0].token_ids, [False] * len(samples[0].loss_mask)), *samples[1:]]
    borders = [Sample([0, 1, 0], [False, True, False]), Sample([1, 2], [True, True]), *samples[2:]]
    datasets = [
        TokenDataset(samples),
        TokenDataset(other_id),
        TokenDataset(other_mask),
        TokenDataset(borders),
        TokenDataset(samples[::-1]),
        TokenDataset(samples[:-1]),
        TokenDataset(samples, seed=1),
        TokenDataset(samples, shuffle=True),
        TokenDataset([]),
    ]
    assert len({dataset.fingerprint for dataset in datasets}) == len(datasets)
    moved = [Sample(sample.token_ids, sample.loss_mask, "elsewhere:1") for sample in samples]
    assert TokenDataset(moved).fingerprint == datasets[0].fingerprint


def test_a_run(hf_dir, rows):
    config = DataConfig(dataset=(f"{rows}#7",), val_dataset=(str(rows),))
    train, validation = build_datasets(config, "sft", hf_dir)
    assert (len(train), len(validation)) == (7, 3)
    assert train.shuffle and not validation.shuffle
    again, _ = build_datasets(config, "sft", hf_dir)
    assert again.fingerprint == train.fingerprint
    other, _ = build_datasets(config.model_copy(update={"data_seed": 1}), "sft", hf_dir)
    assert other.fingerprint != train.fingerprint
    tokenizer = small_tokenizer("chatml")
    assert tokenizer.decode(validation[0].token_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nn 0<|im_end|>\n"
        "<|im_start|>assistant\nshort<|im_end|>"
    )
    assert validation.describe().startswith("3 samples, ")


def lengths(dataset: TokenDataset) -> list[int]:
    return [len(sample.token_ids) for sample in dataset]


def test_longer_samples_are_refused_left_out_or_cut(hf_dir, rows):
    config = DataConfig(dataset=(str(rows),), dataset_shuffle=False)
    whole, validation = build_datasets(config, "sft", hf_dir)
    assert not len(validation)
    short, middle, long = lengths(whole)
    assert short < middle < long

    limited = config.model_copy(update={"max_length": middle})
    with pytest.raises(DataError) as caught:
        build_datasets(limited, "sft", hf_dir)
    assert [str(problem) for problem in caught.value.problems] == [
        f"{rows}:3: expected at most {middle} tokens (data.max_length), found {long}. "
        "Raise data.max_length, or set data.truncation_strategy."
    ]
    deleted, _ = build_datasets(limited.model_copy(update={"truncation_strategy": "delete"}), "sft", hf_dir)
    assert lengths(deleted) == [short, middle] and deleted.over_length.num_deleted == 1
    assert "1 longer ones left out" in deleted.describe()
    cut, _ = build_datasets(limited.model_copy(update={"truncation_strategy": "right"}), "sft", hf_dir)
    assert lengths(cut) == [short, middle, middle] and cut.over_length.num_cut == 1
    assert list(cut[2].token_ids) == list(whole[2].token_ids[:middle])
    assert list(cut[2].loss_mask) == list(whole[2].loss_mask[:middle])
    assert "1 longer ones cut" in cut.describe()


def test_a_cut_that_leaves_nothing_trained_leaves_the_sample_out():
    samples = [Sample([1] * 12, [False] * 9 + [True] * 3, "f:1"), Sample([1] * 12, [False] * 2 + [True] * 10, "f:2")]
    config = DataConfig(dataset=("f",), max_length=8, truncation_strategy="right")
    assert fit_length(samples[0], config) is None
    kept = fit_length(samples[1], config)
    assert kept is not None and kept.place == "f:2" and list(kept.loss_mask) == [0] * 2 + [1] * 6


def test_a_cut_at_the_left_leaves_the_end_and_no_target_without_a_token_before_it():
    config = DataConfig(dataset=("f",), max_length=8, truncation_strategy="left")
    kept = fit_length(Sample(list(range(12)), [False] + [True] * 11), config)
    assert kept is not None and list(kept.token_ids) == list(range(4, 12)) and list(kept.loss_mask) == [0] + [1] * 7
    assert fit_length(Sample(list(range(12)), [False] * 4 + [True] + [False] * 7), config) is None


@pytest.mark.parametrize("strategy", ["delete", "right"])
def test_nothing_left_to_train_is_an_error(hf_dir, rows, strategy):
    config = DataConfig(dataset=(str(rows),), val_dataset=(str(rows),), max_length=8, truncation_strategy=strategy)
    with pytest.raises(DataError, match="at least one with a trained token in its first 8 tokens") as caught:
        build_datasets(config, "sft", hf_dir)
    assert len(caught.value.problems) == 2


def test_ids_that_the_model_has_no_embedding_for(tmp_path, rows):
    config = DataConfig(dataset=(str(rows),))
    train, _ = build_datasets(config, "sft", write_hf_dir(tmp_path / "hf", "chatml"))
    largest = [int(max(sample.token_ids)) for sample in train]
    row = largest.index(max(largest))
    build_datasets(config, "sft", write_hf_dir(tmp_path / "fits", "chatml", vocab_size=max(largest) + 1))
    with pytest.raises(DataError) as caught:
        build_datasets(config, "sft", write_hf_dir(tmp_path / "small", "chatml", vocab_size=max(largest)))
    assert f"{train[row].place}: token id {max(largest)}: expected ids below the model's vocab_size {max(largest)}" in {
        str(problem) for problem in caught.value.problems
    }


def test_problems_of_training_and_validation_rows_come_together(hf_dir, rows, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("short", "a <|im_start|> b"))
    config = DataConfig(dataset=(str(other),), val_dataset=(str(rows), str(other)), max_length=32)
    with pytest.raises(DataError) as caught:
        build_datasets(config, "sft", hf_dir)
    text = str(caught.value)
    assert text.count(f"{other}:1: messages[1].content") == 1  # a file that is named twice is read and reported once
    assert f"{rows}:3: expected at most 32 tokens" in text


@pytest.mark.parametrize(
    ("content", "found"), [(None, "config.json"), ("{", "config.json"), ("{}", "vocab_size"), ("[]", "config.json")]
)
def test_a_folder_without_a_usable_config(tmp_path, rows, content, found):
    folder = write_hf_dir(tmp_path / "hf", "chatml")
    (folder / "config.json").unlink() if content is None else (folder / "config.json").write_text(content)
    with pytest.raises(DataError, match=found):
        build_datasets(DataConfig(dataset=(str(rows),)), "sft", folder)
