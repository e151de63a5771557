"""A model that was damaged on purpose fails the gates of its evaluation, a healthy one passes: ten seeds of each."""

from pathlib import Path

import pytest

from mcore.evaluate.compare import compare_folders
from tests.vllm.damaged_models import KINDS
from tests.vllm.vllm_child import ROOT, run_with_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.faults, pytest.mark.endurance, pytest.mark.timeout(4 * 3600)]

SUITE = ROOT / "configs/suites/knowledge.yaml"
GATES = {"max_perplexity_ratio": 1.2, "worse_confidence": 0.95}
SEEDS = range(10)


@pytest.fixture(scope="module")
def evaluations(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("damaged")
    script = "tests/vllm/damaged_models.py"
    finished = run_with_vllm(script, smollm2, SUITE, output, *SEEDS, scratch=output)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return output


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_damaged_fail_and_the_healthy_pass(evaluations: Path, kind: str, seed: int) -> None:
    comparison = compare_folders(evaluations / "base", evaluations / f"{kind}-{seed}", **GATES)
    (group,), (prose,) = comparison.groups, comparison.perplexity_sets
    found = f"lost {group.lost}, gained {group.gained} of {group.num_cases}, perplexity x {prose.ratio:.3f}"
    assert bool(comparison.failed_gates) == (kind != "healthy"), found


def test_the_base_knows_enough_for_a_loss_to_show(evaluations: Path) -> None:
    comparison = compare_folders(evaluations / "base", evaluations / "base", **GATES)
    assert not comparison.failed_gates
    assert comparison.groups[0].base_passed >= 40
