from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mcore.backend import parallel
from tests.tiny_runs import make_base


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models take longer with more, and their sums come out otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def no_groups_left() -> Iterator[None]:
    """`train` leaves the process groups up; the next file may convert a model, for which there must be none."""
    yield
    parallel.stop()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base checkpoint of a tiny Llama."""
    folder = tmp_path_factory.mktemp("train") / "base"
    make_base(folder, "llama")
    return folder
