"""The gate is tested by wrong conversions: every one must be stopped, every healthy model must pass.

A few of them always; all of them, with five seeds of every healthy model, among the long tests: there the command runs
once, in a process of its own, and each row of what it found is a test.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from mcore.bridge.families import SUPPORTED, dims_of, family_of
from mcore.verify.mutants.catalogue import MUTANTS
from mcore.verify.mutants.mutant import nothing
from mcore.verify.mutants.run import HEALTHY, Results, Verdict, run_mutants
from mcore.verify.mutants.tiny_models import tiny_config

CARD = Path(__file__).parents[4] / "docs" / "benchmarks" / "mutants.md"
NUM_SEEDS = 5
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
FEW = list(BY_NAME)[::7]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> list[Verdict]:
    return run_mutants([BY_NAME[name] for name in FEW], tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    output = tmp_path_factory.mktemp("mutants") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "mcore.verify.mutants", "--output", output, "--num-seeds", str(NUM_SEEDS)],
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 3), done.stderr
    assert (output / "mutants.md").read_text() in done.stdout
    return Results.model_validate_json((output / "mutants.json").read_text())


def test_names_are_used_once():
    assert len(BY_NAME) == len(MUTANTS) >= 40
    assert {mutant.family for mutant in MUTANTS} == set(SUPPORTED.values())


def stopped_by_its_logits(verdicts, name):
    verdict = next(verdict for verdict in verdicts if verdict.name == name)
    assert not verdict.numerical_passed
    assert verdict.first_bad_point == BY_NAME[name].where
    assert verdict.relative_error > 1e-3  # ten times the gate, so none is stopped by luck


def test_a_few_of_several_families_are_enough_for_every_day():
    assert len(FEW) >= 12
    assert len({BY_NAME[name].family for name in FEW}) >= 8


@pytest.mark.parametrize("name", FEW)
def test_a_mutant_is_stopped(few, name):
    stopped_by_its_logits(few, name)


@pytest.mark.layouts
def test_every_mutant_ran(results):
    assert [verdict.name for verdict in results.mutants] == list(BY_NAME)


@pytest.mark.layouts
@pytest.mark.parametrize("name", BY_NAME)
def test_the_mutant_is_stopped_by_its_logits_and_found_where_it_is(results, name):
    stopped_by_its_logits(results.mutants, name)


@pytest.mark.layouts
@pytest.mark.parametrize("name", [m.name for m in MUTANTS if m.tensors is nothing])
def test_bits_alone_do_not_stop_a_wrong_table_or_config(results, name):
    assert next(verdict for verdict in results.mutants if verdict.name == name).structural_passed


@pytest.mark.layouts
def test_peers_rules_let_some_mutants_pass(results):
    assert sum(verdict.passes_mean_abs for verdict in results.mutants) >= 5
    assert sum(verdict.passes_cosine for verdict in results.mutants) >= 5


@pytest.mark.layouts
def test_no_false_alarm(results):
    assert len(results.healthy) == NUM_SEEDS * len(HEALTHY)
    assert {family for family, _ in HEALTHY} == set(SUPPORTED.values())
    assert [v.name for v in results.healthy if not (v.structural_passed and v.numerical_passed)] == []
    assert max(v.relative_error for v in results.healthy) < 2e-5  # a fifth of the gate
    assert {v.first_bad_point for v in results.healthy} == {None}


def test_wrong_rows_are_exact_inverses():
    """Else a bitwise proof would stop them, and they would show nothing about the logits."""
    families = {name: family_of(arch) for arch, name in SUPPORTED.items() if arch.endswith("ForCausalLM")}
    changed = 0
    for mutant in MUTANTS:
        family = families[mutant.family]
        config = tiny_config(mutant.family, tie_word_embeddings=mutant.tied)
        dims = dims_of(config.to_dict() | {"architectures": [family.hf_architecture]}, make_vocab_size_divisible_by=128)
        for row, right in zip(mutant.table(family).rules, family.rules, strict=True):
            if row == right and type(row) is type(right):
                continue
            for part, (num_rows, *_) in enumerate(row.hf_shapes(dims)):
                runs = [run for run in row.runs(dims) if run.part == part]
                covered = sorted(r for run in runs for r in range(num_rows)[run.hf_rows])
                assert covered == list(range(num_rows)), (mutant.name, row)
            filled = [r for run in row.runs(dims) for r in range(run.mcore_row, run.mcore_row + run.num_rows)]
            assert len(filled) == len(set(filled)) and max(filled) < row.mcore_shape(dims)[0]
            changed += 1
    assert changed > 20


def test_the_card_shows_every_mutant():
    card = CARD.read_text()
    assert [name for name in BY_NAME if f"| `{name}` |" not in card] == []
    assert f"{len(MUTANTS)} of {len(MUTANTS)} mutants are stopped by T1" in card
