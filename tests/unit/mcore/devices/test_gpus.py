"""What nvidia-smi says, read; and what of it may be used."""

import os
import stat
from pathlib import Path

import pytest

from mcore.devices import Request, installed_gpus, visible
from mcore.devices.gpus import Gpu, parsed

ANSWER = """\
0, GPU-6f0c1a2b-1111-2222-3333-444455556666, 81559, 1, 570.86.15, NVIDIA H100 80GB HBM3
1, GPU-7a0c1a2b-1111-2222-3333-444455556666, 81559, 40780, 570.86.15, NVIDIA H100 80GB HBM3
"""


def test_each_line_is_a_gpu() -> None:
    first, second = parsed(ANSWER)
    assert first == Gpu(
        0, "GPU-6f0c1a2b-1111-2222-3333-444455556666", 81559 / 1024, 81558 / 1024, "570.86.15", first.name
    )
    assert first.name == "NVIDIA H100 80GB HBM3"
    assert second.index == 1 and second.free_gib == pytest.approx((81559 - 40780) / 1024)


@pytest.mark.parametrize(
    "answer", ["", "No devices were found\n", "0, GPU-1, [N/A], [N/A], 570, x\n", "Failed, a, b\n"]
)
def test_what_is_no_gpu_is_none(answer: str) -> None:
    assert parsed(answer) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [(None, [0, 1]), ("", []), ("1", [1]), ("0, 1", [0, 1]), ("GPU-7a0c1a2b", [1]), ("MIG-1234", []), ("-1", [])],
)
def test_a_scheduler_may_have_chosen(words: str | None, expected: list[int]) -> None:
    environment = {} if words is None else {"CUDA_VISIBLE_DEVICES": words}
    assert [gpu.index for gpu in visible(parsed(ANSWER), environment)] == expected


def program(folder: Path, text: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_program_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "answer").write_text(ANSWER)
    program(tmp_path, f'case "$1" in --query-gpu=index,uuid,*) cat {tmp_path}/answer;; *) exit 2;; esac')
    assert [gpu.index for gpu in installed_gpus()] == [0, 1]
    wanted = Request(1, tmp_path, "x", devices=(1, 7), slots=16)
    (device,) = wanted.candidates()
    assert (device.index, device.label, device.is_gpu) == (1, "GPU 1", True)
    assert device.used_share == pytest.approx(0.5, abs=0.01)
    program(tmp_path, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert installed_gpus() == []
