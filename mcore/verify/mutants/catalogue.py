"""The mutants: every mistake in a converter that we know of, each as a wrong conversion of a healthy tiny model.

A mistake sits in one of three places: the weight table (`rows`), the reading of `config.json` (`config`), or the
tensors on their way (`tensors`). Where it can, it sits in the middle of the model: the proof must find it there.
"""

from __future__ import annotations

from mcore.verify.mutants import dense, experts, latent, normed
from mcore.verify.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (*dense.MUTANTS, *normed.MUTANTS, *experts.MUTANTS, *latent.MUTANTS)
