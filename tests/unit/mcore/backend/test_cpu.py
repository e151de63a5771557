from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as tracker
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from mcore.backend import cpu

BRIDGED = [
    (torch.cuda, name)
    for name in (
        "current_device",
        "set_device",
        "synchronize",
        "empty_cache",
        "get_rng_state",
        "set_rng_state",
        "manual_seed",
        "current_stream",
        "stream",
    )
] + [
    (tracker, "_get_cuda_rng_state"),
    (tracker, "_set_cuda_rng_state"),
    (MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream"),
    (dist, "all_to_all_single"),
    (dist, "all_gather"),
]


@pytest.fixture(autouse=True)
def _bare() -> Iterator[None]:
    """Takes away, for one test, the bridges that another test has installed for good."""
    installed, cpu._installed = cpu._installed, None
    if installed is not None:
        installed.close()
    yield
    if cpu._installed is not None:
        cpu._installed.close()
        cpu._installed = None
    if installed is not None:
        cpu.install_cpu_backend()


@pytest.fixture
def bridged() -> Iterator[None]:
    with cpu.cpu_backend():
        yield


def test_what_asks_for_cuda_gets_the_cpu(bridged) -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.zeros(2).cuda().device.type == "cpu"
    assert torch.zeros(2).to("cuda").device.type == "cpu"
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    torch.cuda.synchronize()


def test_there_is_one_stream_and_nothing_to_wait_for(bridged) -> None:
    stream = MoEAlltoAllTokenDispatcher.cuda_dtoh_stream
    assert torch.cuda.current_stream() is stream
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        assert stream.record_event().synchronize() is None


def test_other_devices_and_types_stay_as_they_are(bridged) -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).to("meta").device.type == "meta"
    assert torch.zeros(2).to(torch.float64).dtype == torch.float64
    assert torch.zeros(2).type(torch.float64).dtype == torch.float64
    assert torch.zeros(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"


def test_the_rng_tracker_draws_from_its_own_state_and_gives_the_old_one_back(bridged, caplog) -> None:
    states = tracker.CudaRNGStatesTracker()
    torch.manual_seed(0)
    states.add("mine", 7)
    with caplog.at_level(logging.WARNING), states.fork("mine"):
        first = torch.rand(3)
    outside = torch.rand(3)
    with states.fork("mine"):
        second = torch.rand(3)

    torch.manual_seed(0)
    assert torch.equal(outside, torch.rand(3))
    torch.manual_seed(7)
    assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(3), torch.rand(3)]))
    assert not caplog.records


def test_recomputed_activations_see_the_same_random_numbers(bridged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "get_cuda_rng_tracker", tracker.CudaRNGStatesTracker)
    hidden = torch.ones(64, requires_grad=True)
    torch.manual_seed(0)
    dropped = tracker.checkpoint(lambda x: torch.nn.functional.dropout(x * x, 0.5), False, hidden)
    torch.rand(5)  # moves the generator between forward and backward
    dropped.sum().backward()
    assert torch.equal(hidden.grad, 2 * dropped.detach())


def test_everything_is_put_back() -> None:
    before = [getattr(owner, name) for owner, name in BRIDGED]
    with cpu.cpu_backend():
        assert all(getattr(owner, name) is not old for (owner, name), old in zip(BRIDGED, before, strict=True))
    assert [getattr(owner, name) for owner, name in BRIDGED] == before


def test_installing_twice_changes_nothing() -> None:
    cpu.install_cpu_backend()
    stack, once = cpu._installed, [getattr(owner, name) for owner, name in BRIDGED]
    cpu.install_cpu_backend()
    with cpu.cpu_backend():
        assert [getattr(owner, name) for owner, name in BRIDGED] == once
    assert cpu._installed is stack


def test_nothing_is_bridged_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = [getattr(owner, name) for owner, name in BRIDGED]
    cpu.install_cpu_backend()
    with cpu.cpu_backend():
        assert [getattr(owner, name) for owner, name in BRIDGED] == before
    assert cpu._installed is None
