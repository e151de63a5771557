"""`launch`: what no launcher can do is refused, with all of it named, and no name gets out of its place."""

from typing import Any

import pytest
from pydantic import ValidationError

from configs.schema.launch import LaunchConfig
from configs.schema.run import RunConfig

BY_HAND: dict[str, Any] = {"nnodes": 2, "rdzv_endpoint": "10.0.0.1:29400"}
KUBERNETES = {"image": "r/i:1", "volume_claim": "store", "mount_path": "/store"}


def problems(**launch: Any) -> str:
    try:
        LaunchConfig.model_validate(launch)
    except ValidationError as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize(
    "launch",
    [
        {},
        BY_HAND | {"socket_ifname": "eth0"},
        {"launcher": "slurm"},
        {"launcher": "slurm", "nnodes": 4, "slurm": {"partition": "gpu", "time_limit_minutes": 5}},
        {"launcher": "kubernetes", "nnodes": 4, "kubernetes": KUBERNETES},
    ],
)
def test_what_fits_together_is_taken(launch):
    assert problems(**launch) == ""


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"nnodes": 2}, "nnodes: 2 with launcher: local needs rdzv_endpoint"),
        ({"rdzv_endpoint": "h:1"}, "rdzv_endpoint needs launcher: local and nnodes of at least 2"),
        ({"launcher": "slurm", "nnodes": 2, "rdzv_endpoint": "h:1"}, "rdzv_endpoint needs launcher: local"),
        ({"launcher": "kubernetes"}, "launcher: kubernetes needs launch.kubernetes"),
        ({"slurm": {}}, "launch.slurm belongs to launcher: slurm, found launcher: local"),
        ({"launcher": "slurm", "kubernetes": KUBERNETES}, "launch.kubernetes belongs to launcher: kubernetes"),
        ({"socket_ifname": "eth0"}, "socket_ifname needs nnodes of at least 2"),
        ({"nnodes": 2, "rdzv_endpoint": "h:99999"}, "a port from 1 to 65535"),
        ({"launcher": "slurm", "slurm": {"time_limit_minutes": 4}}, "must be more than twice grace_s"),
    ],
)
def test_what_does_not_is_refused(launch, message):
    assert message in problems(**launch)


def test_all_of_it_is_told_at_once():
    message = problems(nnodes=2, slurm={}, kubernetes=KUBERNETES)
    assert all(part in message for part in ("launch.slurm belongs", "launch.kubernetes belongs", "needs rdzv_endpoint"))


@pytest.mark.parametrize("word", ["a b", "a;b", "$(x)", "a'b", "a\nb", "#b", "-b", "", "a" * 200, "`x`", "a#b"])
@pytest.mark.parametrize("field", ["partition", "account", "qos", "reservation", "constraint"])
def test_a_word_that_a_script_would_read_otherwise_is_refused(field, word):
    assert problems(launcher="slurm", slurm={field: word})


@pytest.mark.parametrize(
    "changes",
    [
        {"namespace": "a b"}, {"namespace": "A"}, {"volume_claim": "../x"}, {"image": "a b"}, {"image": "-v"},
        {"mount_path": "relative"}, {"mount_path": "/a b"}, {"context": "--x"}, {"queue": "a,b"}, {"python": "a b"},
        {"node_selector": {"a": "b c"}},
    ],
)  # fmt: skip
def test_a_name_that_kubernetes_does_not_take_is_refused(changes):
    assert problems(launcher="kubernetes", kubernetes=KUBERNETES | changes)


@pytest.mark.parametrize("endpoint", ["h", "h:", ":1", "-h:1", "h:1:2", "h h:1", "h:x", "$(h):1"])
def test_an_endpoint_is_a_host_and_a_port(endpoint):
    assert problems(nnodes=2, rdzv_endpoint=endpoint)


def test_the_layout_is_divided_over_all_machines():
    raw = {
        "name": "n", "model": {"source": "m"}, "data": {"dataset": ["d"]}, "launch": BY_HAND | {"nproc_per_node": 2},
        "train": {"train_iters": 1, "tensor_model_parallel_size": 2, "global_batch_size": 8, "micro_batch_size": 4},
    }  # fmt: skip
    assert RunConfig.model_validate(raw).data_parallel_size == 2
    raw["train"]["tensor_model_parallel_size"] = 8
    with pytest.raises(ValidationError, match=r"launch.nnodes x nproc_per_node \(2 x 2 = 4\) must be a multiple"):
        RunConfig.model_validate(raw)
