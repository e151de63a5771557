from __future__ import annotations

import psutil
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes, set_seed, start, stop
from mcore.errors import ConfigError


def test_one_process_needs_no_torchrun_and_may_start_again() -> None:
    for _ in range(2):
        with parallel_processes(Layout()) as device:
            assert device == torch.device("cpu")
            assert dist.get_world_size() == parallel_state.get_tensor_model_parallel_world_size() == 1
        assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    stop()  # nothing to leave, and no complaint


def test_a_layout_leaves_the_groups_of_the_one_before() -> None:
    with parallel_processes(Layout()):
        threads = psutil.Process().num_threads()
        start(Layout())
        assert psutil.Process().num_threads() == threads


def test_groups_are_left_when_the_block_raises() -> None:
    with pytest.raises(RuntimeError, match="inside"), parallel_processes(Layout()):
        raise RuntimeError("inside")
    assert not dist.is_initialized()


def test_a_seed_gives_the_same_numbers_again_and_another_seed_others() -> None:
    def draws(seed: int) -> torch.Tensor:
        set_seed(seed)
        outside = torch.rand(4)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return torch.cat([outside, torch.rand(4)])

    with parallel_processes(Layout()):
        assert torch.equal(draws(1), draws(1))
        assert not torch.isin(draws(1), draws(2)).any()


def test_a_number_of_processes_that_does_not_fit_is_refused_before_anything_starts(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    layout = Layout(tensor_model_parallel_size=2)
    with pytest.raises(ConfigError, match=r"processes: expected a multiple of 2 .*, found 3"):
        start(layout)
    assert not dist.is_initialized()
