"""Files from elsewhere are read, never run: no call in the project may open them in a way that runs what they say."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from mcore.backend import parallel
from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.bridge.convert import convert
from mcore.bridge.export import export
from mcore.data.template import load_tokenizer
from mcore.errors import CheckpointError
from mcore.train import checkpoint
from mcore.train.base import open_base
from mcore.train.model import build_training
from mcore.train.run import train
from mcore.train.schedule import Schedule
from mcore.verify.prompts import prompt_set
from mcore.verify.traces import load_hf_model
from tests.hf_folders import assert_same_weights, weights_of, write_hf_folder
from tests.tiny_runs import make_base, tiny_run
from tests.unit.source_calls import calls, keyword


def test_nothing_unpickles_what_it_does_not_know():
    loads = [(place, call) for place, call, name in calls() if name == "torch.load"]
    assert loads
    assert [place for place, call in loads if keyword(call, "weights_only") is not True] == []
    free = ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "marshal.load", "marshal.loads")
    assert [place for place, _, name in calls() if name in free] == []


def test_no_model_or_tokenizer_may_bring_code():
    opened = [
        (place, call)
        for place, call, name in calls()
        # Without a folder, or for a model that is there already, there is no code that could be brought. PEFT's config
        # is a JSON file that can't name any.
        if name.endswith(".from_pretrained")
        and name != "PeftConfig.from_pretrained"
        and not (call.args and ast.unparse(call.args[0]) in ("None", "model"))
    ]
    assert len(opened) >= 5
    assert [place for place, call in opened if keyword(call, "trust_remote_code") is not False] == []
    assert [place for place, call, _ in calls() if keyword(call, "trust_remote_code") is True] == []


@pytest.fixture
def folder(tmp_path):
    """A sound Qwen3 that says that its own code must be run for config, model and tokenizer."""
    hf = tmp_path / "hf"
    config = write_hf_folder(hf, "qwen3")
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(250)}, unk_token="0"))
    tokenizer.save(str(hf / "tokenizer.json"))
    (hf / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = {name: f"own.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}
    (hf / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    (hf / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", "own.OwnFast"]}})
    )
    return hf


def test_code_in_a_models_folder_is_never_run(folder, tmp_path):
    convert(folder, tmp_path / "mcore")
    assert not (tmp_path / "mcore" / "hf" / "own.py").exists()
    model = load_hf_model(folder, torch.device("cpu"))
    assert type(model).__module__ == "transformers.models.qwen3.modeling_qwen3"
    for read in (load_tokenizer, lambda hf: prompt_set(hf, vocab_size=250, num_prompts=3, max_prompt_tokens=16)):
        try:
            read(folder)
        except Exception as exc:
            assert type(exc).__module__ == "mcore.errors"
    assert not (tmp_path / "ran").exists()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["common.pt", "__0_0.distcp", ".metadata"])
def test_no_pickle_of_a_checkpoint_from_elsewhere_is_opened_freely(tmp_path, name):
    write_hf_folder(tmp_path / "hf", "qwen3")
    convert(tmp_path / "hf", tmp_path / "mcore")
    file = tmp_path / "mcore" / "release" / name
    if name == ".metadata":
        file.write_bytes(pickle.dumps([Bomb(tmp_path / "ran"), pickle.loads(file.read_bytes())]))
    elif name == "common.pt":
        torch.save({"args": Bomb(tmp_path / "ran"), "iteration": 0}, file)
    else:
        whole = io.BytesIO()
        torch.save(Bomb(tmp_path / "ran"), whole)
        file.write_bytes(whole.getvalue().ljust(file.stat().st_size, b"\0"))
    try:
        export(tmp_path / "mcore", tmp_path / "back")
    except CheckpointError as error:
        assert name != "common.pt" and error.problems
    else:
        assert name == "common.pt"  # weights do not need it, so it is not opened
        assert_same_weights(weights_of(tmp_path / "back"), weights_of(tmp_path / "hf"))
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a training that may go on: run, base, output."""
    folder = tmp_path_factory.mktemp("trained")
    make_base(folder / "base", "llama")
    run = tiny_run(folder, train_iters=4, save_steps=2, eval_steps=2, save_total_limit=2)
    with parallel_processes(Layout()):
        train(run, folder / "base", folder / "output")
    parallel.stop()
    return run, folder / "base", folder / "output"


def put_into_shard(folder, bomb):
    """Replace an object of a checkpoint, the generators' states, by another pickle, and say so in its `.metadata`."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    (index,) = (index for index in metadata.storage_data if index.fqn.startswith("rng_state"))
    place = metadata.storage_data[index]
    whole = io.BytesIO()
    torch.save(bomb, whole)
    shard = folder / place.relative_path
    place.offset, place.length = shard.stat().st_size, len(whole.getvalue())
    with shard.open("ab") as file:
        file.write(whole.getvalue())
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("name", ["common.pt", "rng_state", ".metadata"])
def test_training_does_not_go_on_from_a_checkpoint_that_would_run_code(trained, tmp_path, name):
    run, base, output = trained
    theirs = tmp_path / "theirs"
    shutil.copytree(output, theirs)
    for folder in theirs.glob("iter_*"):
        if name == "rng_state":
            put_into_shard(folder, Bomb(tmp_path / "ran"))
        elif name == "common.pt":
            torch.save({"args": Bomb(tmp_path / "ran")}, folder / name)
        else:
            (folder / name).write_bytes(
                pickle.dumps([Bomb(tmp_path / "ran"), pickle.loads((folder / name).read_bytes())])
            )
    with parallel_processes(Layout()):
        training = build_training(run.train, Schedule(4, 3), open_base(base, run), Layout(), has_weights=True)
        for folder in theirs.glob("iter_*"):
            with pytest.raises(CheckpointError) as caught:
                checkpoint.load(folder, training, Layout())
            assert name in str(caught.value)
        assert not (tmp_path / "ran").exists()
        checkpoint.load(output / "iter_0000004", training, Layout())  # our own is taken
    parallel.stop()
