"""Choice of a checkpoint: whatever is missing, cut or overwritten on disk is never chosen, and the reason says so."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcore.errors import CheckpointError
from mcore.metrics import append_metrics
from mcore.select import (
    TRACKER,
    completeness_problems,
    is_complete,
    iteration_dir,
    iterations_in,
    read_tracker,
    select_checkpoint,
    shard_lengths,
)

SAVE_WITH_MEGATRON = """
import sys, torch, torch.distributed as dist
from mcore.backend.cpu import install_cpu_backend
if __name__ == "__main__":  # megatron's writer starts a process of its own
    install_cpu_backend()
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/rendezvous", rank=0, world_size=1)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    tensor = ShardedTensor.from_rank_offsets
    dist_checkpointing.save({
        "model": {
            "a": tensor("decoder.a", torch.randn(4, 8)),
            "b": tensor("decoder.b", torch.randn(64).bfloat16()),
            "c": tensor("c", torch.arange(10)),
        },
        "rng_state": ShardedObject("rng_state", {"state": torch.get_rng_state()}, (1, 1), (0, 0)),
        "iteration": 7,
        "args": {"lr": 1e-3},
    }, sys.argv[1] + "/megatron")
    import torch.distributed.checkpoint as dcp
    # torch's own writer, with what a pickle can hold beside tensors
    state = {"w": torch.randn(3, 3), "nested": {"list": [torch.ones(2), 3], "text": "x"}, "object": complex(1, 2)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(sys.argv[1] + "/torch", thread_count=2))
    dist.destroy_process_group()
    # what megatron-core 0.19 does, which keeps the common state under a key of its own; and a checkpoint of nothing
    import pickle
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
    metadata = pickle.load(open(sys.argv[1] + "/megatron/.metadata", "rb"))
    metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    pickle.dump(metadata, open(sys.argv[1] + "/common_inside.metadata", "wb"))
    pickle.dump(Metadata({}, storage_data={}), open(sys.argv[1] + "/empty.metadata", "wb"))
"""


@pytest.fixture(scope="module")
def real_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what megatron-core and torch themselves write: `megatron/` and `torch/`."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "megatron").mkdir()
    (folder / "save.py").write_text(SAVE_WITH_MEGATRON)
    subprocess.run([sys.executable, str(folder / "save.py"), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture
def checkpoint(real_checkpoints: Path, tmp_path: Path) -> Path:
    """Iterations 100, 200 and 300, all complete; the tracker says 300."""
    for iteration in (100, 200, 300):
        shutil.copytree(real_checkpoints / "megatron", iteration_dir(tmp_path, iteration))
    (tmp_path / TRACKER).write_text("300")
    return tmp_path


def test_megatrons_own_checkpoint_is_complete(real_checkpoints: Path) -> None:
    folder = real_checkpoints / "megatron"
    assert completeness_problems(folder) == []
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert shard_lengths(folder) == {name: size for name, size in files.items() if name.endswith(".distcp")}
    assert {"metadata.json", ".metadata", "common.pt"} < set(files)


def test_metadata_of_torchs_own_writer_is_understood(real_checkpoints: Path) -> None:
    folder = real_checkpoints / "torch"
    lengths = shard_lengths(folder)
    assert lengths == {path.name: path.stat().st_size for path in folder.glob("*.distcp")}
    problems = [Path(problem.subject).name for problem in completeness_problems(folder)]
    assert problems == ["metadata.json", "common.pt"]  # what megatron-core would have written beside it


def test_reading_metadata_imports_no_torch_and_runs_nothing(real_checkpoints: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom mcore.select import is_complete\n"
        f"assert is_complete(Path({str(real_checkpoints / 'megatron')!r}))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

    class Attack:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "written"), "w"))

    shutil.copytree(real_checkpoints / "megatron", tmp_path / "release")
    (tmp_path / "release" / ".metadata").write_bytes(pickle.dumps(Attack()))
    assert not is_complete(tmp_path / "release") and not (tmp_path / "written").exists()


def test_the_folder_of_one_iteration_is_taken_as_it_is(checkpoint: Path) -> None:
    folder = iteration_dir(checkpoint, 200)
    assert (select_checkpoint(folder).iteration, select_checkpoint(folder).path) == (200, folder)
    weights = folder.rename(checkpoint / "weights")  # as NeMo names it
    assert select_checkpoint(weights).iteration == "release"
    (weights / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        select_checkpoint(weights)


def test_latest_follows_a_tracker_that_is_right(checkpoint: Path) -> None:
    selection = select_checkpoint(checkpoint)
    assert (selection.iteration, selection.path) == (300, checkpoint / "iter_0000300")
    assert selection.reason == f"{TRACKER} says 300"
    (checkpoint / TRACKER).write_text("100\n")
    assert select_checkpoint(checkpoint).iteration == 100  # older than the newest, but what was asked for


def test_a_converted_base_is_chosen_by_its_name(checkpoint: Path) -> None:
    (checkpoint / "iter_0000100").rename(checkpoint / "release")
    (checkpoint / TRACKER).write_text("release")
    assert select_checkpoint(checkpoint).path == checkpoint / "release"


@pytest.mark.parametrize("text", ["", "latest", "-100", "100.0", "1e2", "١٠٠", "9" * 40, "../release", "100\n200"])
def test_a_tracker_with_garbage_is_not_believed(checkpoint: Path, text: str) -> None:
    (checkpoint / TRACKER).write_text(text)
    assert read_tracker(checkpoint) is None
    selection = select_checkpoint(checkpoint)
    assert selection.iteration == 300 and "missing or unreadable" in selection.reason


def test_a_tracker_that_is_missing_binary_or_a_folder_is_not_believed(checkpoint: Path) -> None:
    tracker = checkpoint / TRACKER
    tracker.write_bytes(b"\xff\xfe300")
    assert select_checkpoint(checkpoint).iteration == 300
    tracker.unlink()
    assert select_checkpoint(checkpoint).iteration == 300
    tracker.mkdir()
    assert "newest complete one is 300" in select_checkpoint(checkpoint).reason


def test_a_tracker_ahead_of_the_data_falls_back(checkpoint: Path) -> None:
    (checkpoint / TRACKER).write_text("400")
    selection = select_checkpoint(checkpoint)
    assert selection.iteration == 300
    assert selection.reason == f"{TRACKER} says 400, which is not complete; newest complete one is 300"


def test_what_is_no_iteration_is_not_looked_at(checkpoint: Path) -> None:
    for name in ("iter_latest", "iter_12", "iter_0000900.partial", "iter_0000900_tmp"):
        (checkpoint / name).mkdir()
    (checkpoint / "iter_0000800").write_text("a file")
    assert iterations_in(checkpoint) == [100, 200, 300, 800]
    (checkpoint / TRACKER).unlink()
    assert select_checkpoint(checkpoint).iteration == 300


def test_a_cut_anywhere_in_any_file_is_found(checkpoint: Path) -> None:
    folder = checkpoint / "iter_0000300"
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) >= 5
    for name in names:
        file = folder / name
        content = file.read_bytes()
        for length in {*range(0, len(content), 37), *range(40), *range(len(content) - 40, len(content))}:
            file.write_bytes(content[:length])
            assert not is_complete(folder), (name, length)
        file.unlink()
        assert not is_complete(folder), name
        file.write_bytes(content)
    assert is_complete(folder)


DAMAGES = ("deleted", "empty", "cut", "zeros", "garbage", "folder")


def damage(file: Path, kind: str, data: st.DataObject) -> None:
    size = file.stat().st_size
    if kind == "cut":
        with file.open("r+b") as stream:
            stream.truncate(data.draw(st.integers(0, size - 1), label="length"))
    elif kind in {"zeros", "garbage"}:  # at full length, as a power cut may leave it
        file.write_bytes(bytes(size) if kind == "zeros" else data.draw(st.randoms()).randbytes(size))
    else:
        file.unlink()
        if kind == "empty":
            file.touch()
        elif kind == "folder":
            file.mkdir()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_iteration_is_never_chosen(real_checkpoints: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Any subset of the iterations damaged in any way: the newest whole one is chosen, or every problem is named."""
    shutil.rmtree(tmp_path)
    damaged = data.draw(st.sets(st.sampled_from([100, 200, 300])), label="damaged")
    for iteration in (100, 200, 300):
        folder = iteration_dir(tmp_path, iteration)
        shutil.copytree(real_checkpoints / "megatron", folder)
        if iteration in damaged:
            name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())), label="file")
            damage(folder / name, data.draw(st.sampled_from(DAMAGES), label="damage"), data)
    tracked = data.draw(st.sampled_from(["100", "200", "300", "400", "release", "garbage", None]), label="tracker")
    if tracked is not None:
        (tmp_path / TRACKER).write_text(tracked)
    whole = {100, 200, 300} - damaged
    if not whole:
        with pytest.raises(CheckpointError) as error:
            select_checkpoint(tmp_path)
        text = str(error.value)
        assert all(f"iter_0000{iteration}" in text for iteration in damaged) and TRACKER in text
        return
    selection = select_checkpoint(tmp_path)
    if tracked in {str(iteration) for iteration in whole}:
        assert (str(selection.iteration), selection.reason) == (tracked, f"{TRACKER} says {tracked}")
    else:
        assert selection.iteration == max(whole)
        assert f"newest complete one is {max(whole)}" in selection.reason and TRACKER in selection.reason
    assert is_complete(selection.path)
    for iteration in damaged:
        with pytest.raises(CheckpointError):
            select_checkpoint(tmp_path, "iteration", iteration)


def test_metadata_that_speaks_of_nothing_is_not_complete(real_checkpoints: Path, checkpoint: Path) -> None:
    folder = checkpoint / "iter_0000300"
    shutil.copy(real_checkpoints / "empty.metadata", folder / ".metadata")
    assert not is_complete(folder)


def test_other_formats_are_not_taken_for_ours(checkpoint: Path) -> None:
    for text in ('{"sharded_backend": "zarr"}', "[]", "null", '"torch_dist"'):
        (checkpoint / "iter_0000300" / "metadata.json").write_text(text)
        assert not is_complete(checkpoint / "iter_0000300")


def test_one_iteration_by_number(checkpoint: Path) -> None:
    assert select_checkpoint(checkpoint, "iteration", 200).path == checkpoint / "iter_0000200"
    with pytest.raises(CheckpointError, match="iter_0000150"):
        select_checkpoint(checkpoint, "iteration", 150)
    with pytest.raises(CheckpointError, match="needs one"):
        select_checkpoint(checkpoint, "iteration")


def note_losses(checkpoint: Path, losses: dict[int, Any]) -> None:
    for iteration, loss in losses.items():
        append_metrics(checkpoint / "metrics.jsonl", {"iteration": iteration, "loss": 0.0})
        append_metrics(checkpoint / "metrics.jsonl", {"iteration": iteration, "validation_loss": loss})


def test_best_is_the_lowest_loss_that_was_saved_whole(checkpoint: Path) -> None:
    note_losses(checkpoint, {50: 0.1, 100: 0.9, 200: 0.5, 300: 0.7})
    assert select_checkpoint(checkpoint, "best").iteration == 200
    (checkpoint / "iter_0000200" / "common.pt").unlink()
    selection = select_checkpoint(checkpoint, "best")
    assert selection.iteration == 300 and selection.reason == "lowest validation loss 0.7000 of 2"


def test_a_loss_that_is_no_number_is_never_the_best(checkpoint: Path) -> None:
    note_losses(checkpoint, {100: float("nan"), 200: 0.5, 300: float("-inf")})
    assert select_checkpoint(checkpoint, "best").iteration == 200
    note_losses(checkpoint, {300: None, 100: "0.1"})
    assert select_checkpoint(checkpoint, "best").iteration == 200
    note_losses(checkpoint, {200: float("nan")})  # the last word on an iteration counts
    with pytest.raises(CheckpointError, match="eval_steps"):
        select_checkpoint(checkpoint, "best")


def test_equal_losses_take_the_earlier_iteration(checkpoint: Path) -> None:
    note_losses(checkpoint, {300: 0.5, 200: 0.5})
    assert select_checkpoint(checkpoint, "best").iteration == 200


def test_best_without_losses_says_what_there_is(checkpoint: Path) -> None:
    append_metrics(checkpoint / "metrics.jsonl", {"iteration": 150, "validation_loss": 1.0})
    with pytest.raises(CheckpointError) as error:
        select_checkpoint(checkpoint, "best")
    problem, *_ = error.value.problems
    assert "[100, 200, 300]" in problem.found and "[150]" in problem.found and problem.fix


def test_best_names_what_is_wrong_with_every_candidate(checkpoint: Path) -> None:
    note_losses(checkpoint, {100: 0.5})
    (checkpoint / "iter_0000100" / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000100/common\.pt"):
        select_checkpoint(checkpoint, "best")


def test_common_state_inside_the_shards_needs_no_file(real_checkpoints: Path, checkpoint: Path) -> None:
    folder = checkpoint / "iter_0000300"
    (folder / "common.pt").unlink()
    assert not is_complete(folder)
    shutil.copy(real_checkpoints / "common_inside.metadata", folder / ".metadata")
    assert is_complete(folder)


def test_metadata_json_is_what_megatron_writes(checkpoint: Path) -> None:
    written = json.loads((checkpoint / "iter_0000100" / "metadata.json").read_text())
    assert written["sharded_backend"] == "torch_dist"
