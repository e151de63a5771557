from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes


@pytest.fixture(scope="module")
def alone() -> Iterator[torch.device]:
    """Process groups of this one process, for a module's tests."""
    with parallel_processes(Layout()) as device:
        yield device
