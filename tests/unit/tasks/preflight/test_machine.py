"""What a machine can't do is told before anything starts, and only for stages that will run."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema.run import RunConfig
from mcore.artifacts import Store
from mcore.devices import DeviceLease
from mcore.devices.gpus import Gpu
from mcore.errors import InputError
from tasks.preflight import check_run
from tasks.preflight.devices import count_problems, host_memory, memory_problems, request_of
from tasks.preflight.machine import collective_problems, stages_to_run
from tasks.preflight.store import write_problems
from tasks.preflight.versions import driver_problems, package_problems, packages
from tests.unit.tasks.model_folders import CONFIG, listing, write_workspace


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    raw = write_workspace(tmp_path)
    return {**raw, "launch": {"device_locks": str(tmp_path.parent / f"{tmp_path.name}-locks")}}


WITHOUT_DEVICES = ["launch.devices", "launch.nproc_per_node (1)", "evaluate.tensor_parallel_size (1)"]


def problems_of(raw: dict[str, Any], **launch: Any) -> list[str]:
    before = listing(Path.cwd())
    with pytest.raises(InputError) as error:
        check_run({**raw, "launch": raw["launch"] | launch}, here=True)
    assert listing(Path.cwd()) == before, "something was written"
    return [str(problem) for problem in error.value.problems]


def test_a_good_machine_passes_quickly_and_nothing_is_written(raw: dict[str, Any]) -> None:
    before, begin = listing(Path.cwd()), time.monotonic()
    check_run({**raw, "launch": raw["launch"] | {"device_slots": 1}}, here=True)
    assert time.monotonic() - begin < 2
    assert listing(Path.cwd()) == before


def test_devices_that_are_not_there_are_refused(raw: dict[str, Any]) -> None:
    (problem,) = problems_of(raw, device_slots=2, devices=[0, 7])
    assert problem == "launch.devices: 7: expected a slot of this machine (0, 1), found none. Name one that is there."
    (problem,) = problems_of(raw, devices=[0])
    assert problem.startswith("launch.devices: expected GPUs on this machine, found none")


def test_more_processes_than_devices_are_refused(raw: dict[str, Any]) -> None:
    (problem,) = problems_of(raw, device_slots=2, nproc_per_node=4)
    assert problem.startswith("launch.nproc_per_node (4): expected at most the slots that launch.device_slots has (2)")
    (problem,) = problems_of(raw, device_slots=4, devices=[1, 2], nproc_per_node=4)
    assert "at most the slots that launch.devices has (2), found 4" in problem


def test_findings_about_the_machine_come_with_all_others(raw: dict[str, Any]) -> None:
    (Path("model") / "tokenizer.json").unlink()
    problems = problems_of(raw, device_slots=2, devices=[5])
    assert [problem.partition(":")[0] for problem in problems][1:] == WITHOUT_DEVICES
    assert "expected a tokenizer" in problems[0]


def test_only_stages_that_will_run_are_looked_at(raw: dict[str, Any]) -> None:
    checked = check_run({**raw, "evaluate": None})
    plan = next(plan for plan in checked.stages if plan.name == "train")
    folder = checked.store.partial(plan.kind, plan.key)
    folder.mkdir(parents=True)
    (folder / "file").write_text("x")
    checked.store.commit(
        plan.kind, plan.key, inputs=plan.inputs, input_content={}, ingredients=plan.ingredients, metrics={},
        versions={}, duration_s=1.0,
    )  # fmt: skip
    assert "train" not in stages_to_run(checked.run, checked.stages, checked.store)
    # Training is there, so nobody asks for its processes, and evaluation there is none.
    few = {"device_slots": 1, "devices": [9]}
    check_run({**raw, "evaluate": None, "launch": raw["launch"] | few}, here=True)
    assert len(problems_of(raw, **few)) == 2  # evaluation would run: a slot that is not there, and none is left


def test_room_for_everything_that_comes_is_summed_up(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(Path.cwd())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=40_000))
    (problem,) = problems_of(raw)
    assert "room for 0.000 GB: the converted base" in problem and "2 checkpoints of" in problem
    assert "the exported model" in problem and "0.000 GB free" in problem
    weights = (Path("model") / "model.safetensors").stat().st_size
    # bf16 weights, fp32 copies and two moments a checkpoint; weights alone twice more, converted and exported.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=weights * (2 * 7 + 2) * 2))
    check_run(raw, here=True)


def test_a_folder_that_takes_no_bytes_is_told(tmp_path: Path) -> None:
    assert write_problems(tmp_path / "not" / "there") == [] and list(tmp_path.iterdir()) == []
    (problem,) = write_problems(Path("/proc/self"))
    assert problem.subject == "launch.store: /proc/self" and "64 KiB" in problem.expected and problem.fix


def gpu(index: int, total: float = 80.0, free: float = 79.0, driver: str = "570.86.15") -> Gpu:
    return Gpu(index, f"GPU-{index}", total, free, driver, "H100")


def test_drivers_too_old_for_torch_are_told() -> None:
    assert driver_problems([], None, "train") == []
    assert driver_problems([gpu(0)], "12.8", "train") == []
    (problem,) = driver_problems([gpu(0), gpu(1, driver="515.105.01")], "12.8", "train")
    assert str(problem).startswith("train (torch for CUDA 12.8): expected NVIDIA driver 525.60.13 or newer, found 515.")
    (problem,) = driver_problems([gpu(0)], "13.0", "train")
    assert "580.65.06" in problem.expected
    (problem,) = driver_problems([gpu(0)], None, "evaluate.python: x")
    assert problem.found == "a build without"


def test_packages_are_compared_with_the_ranges_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: fits for name, _, _, fits in packages()}
    assert len(found) >= 15 and {"torch", "fastapi", "prefect"} <= set(found)
    assert package_problems() == []
    from importlib import metadata

    real = metadata.version
    wrong = {"fastapi": "0.165.0", "prefect": "3.8.7"}
    monkeypatch.setattr(metadata, "version", lambda name: wrong.get(name) or real(name))
    first, second = sorted(map(str, package_problems()))
    assert first.startswith("package fastapi: expected <0.151,>=0.139, found 0.165.0")
    assert second.startswith("package prefect: expected <4,>=3.8.8, found 3.8.7")


def run_of(raw: dict[str, Any], **launch: Any) -> RunConfig:
    return RunConfig.model_validate({**raw, "launch": raw["launch"] | launch})


BIG = CONFIG | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256,
                "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip


def test_what_fits_no_device_is_refused(raw: dict[str, Any]) -> None:
    run = run_of(raw, nproc_per_node=2)
    assert memory_problems(run, CONFIG, [gpu(0), gpu(1)], engine=False) == []
    (problem,) = memory_problems(run, BIG, [gpu(0), gpu(1)], engine=False)
    assert problem.expected == "2 GPUs that can hold it" and "0 of 2, the largest has 80.0 GiB" in problem.found
    (problem,) = memory_problems(run, BIG, [], engine=False)
    assert problem.subject == "training on the CPU with 2 processes"
    assert problem.found == f"{host_memory() / 2**30:.1f} GiB"


def test_what_is_offloaded_must_fit_the_host(raw: dict[str, Any]) -> None:
    run = run_of(raw, nproc_per_node=2)
    offload = {"torch_dtype": "bfloat16", "use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
    run = run.model_copy(update={"train": run.train.model_copy(update=offload)})
    assert memory_problems(run, CONFIG, [gpu(0), gpu(1)], engine=True) == []
    problem = memory_problems(run, BIG, [gpu(0), gpu(1)], engine=True)[-1]
    assert problem.subject == "train.optimizer_cpu_offload with 2 processes"
    # 16 bytes of each of 69.5e9 parameters: 80 layers of 855.6e6 and the embedding; two processes have one half each.
    assert problem.expected == "1035.7 GiB of the host's memory" and problem.found == f"{host_memory() / 2**30:.1f} GiB"


def test_memory_that_others_use_is_told_and_what_runs_of_ours_hold_is_not(raw: dict[str, Any]) -> None:
    run = run_of(raw, nproc_per_node=2)
    taken = gpu(1, free=0.00001)
    (problem,) = memory_problems(run, CONFIG, [gpu(0), taken], engine=False)
    assert problem.expected == "2 GPUs with that much free" and problem.found == "GPU 1: 0.0 of 80.0 GiB"
    assert memory_problems(run, CONFIG, [gpu(0), taken, gpu(2)], engine=False) == []
    from mcore.devices import Device

    lease = DeviceLease(request_of(run.launch, 1, "another run"), lambda: [Device(1, "GPU-1", True)])
    assert lease.try_take()
    assert memory_problems(run, CONFIG, [gpu(0), taken], engine=False) == []  # it comes free


def test_gpus_are_counted_as_slots_are(raw: dict[str, Any]) -> None:
    launch = run_of(raw, devices=(0, 4)).launch
    (missing, few) = count_problems(launch, [gpu(0), gpu(1)], {"launch.nproc_per_node": 2})
    assert missing.subject == "launch.devices: 4" and missing.expected == "a GPU of this machine (0, 1)"
    assert few.expected == "at most the GPUs that launch.devices has (1)"
    assert count_problems(launch, [gpu(0)], {}) == []


def told(raw: dict[str, Any], say: Callable[[str], None] = print, **launch: Any) -> list[str]:
    run = run_of(raw, **launch)
    return [str(problem) for problem in collective_problems(run, (), Store("store"), say)]


def test_processes_are_tried_before_they_are_needed(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(raw, nproc_per_node=2) == [], "without GPUs it is tried only if that is asked for"
    wanted = {"nproc_per_node": 2, "check_collectives": "always"}
    assert told(raw, **wanted) == []
    # A gloo that is told to use an interface that is not there.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    (problem,) = told(raw, **wanted)
    assert problem.startswith("an all-reduce between 2 processes: expected the sum, found ") and "none0" in problem


def test_processes_are_not_tried_on_devices_that_others_hold(raw: dict[str, Any]) -> None:
    launch = {"nproc_per_node": 2, "check_collectives": "always", "device_slots": 2}
    lease = DeviceLease(request_of(run_of(raw, **launch).launch, 1, "another run"))
    assert lease.try_take()
    lines: list[str] = []
    assert told(raw, lines.append, **launch) == []
    assert lines == ["the processes' connection is not tried: slot 0 is held by another run"]
