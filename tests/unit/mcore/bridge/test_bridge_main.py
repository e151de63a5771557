from __future__ import annotations

import json
import os
import subprocess
import sys

from mcore.child import ERROR_FILE_VARIABLE
from mcore.errors import EXIT_INPUT, SourceError, error_from_json
from tests.hf_folders import assert_same_weights, weights_of, write_hf_folder


def bridge(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "mcore.bridge", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {key: str(value) for key, value in environment.items()},
    )


def test_both_commands_by_hand(tmp_path):
    write_hf_folder(tmp_path / "hf", "qwen2_tied")
    done = bridge(
        *("convert", "--hf", tmp_path / "hf", "--output", tmp_path / "mcore", "--make-vocab-size-divisible-by", 512)
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["padded_vocab_size"] == 512
    assert json.loads((tmp_path / "mcore" / "metrics.json").read_text()) == json.loads(done.stdout)
    done = bridge("export", "--checkpoint", tmp_path / "mcore", "--output", tmp_path / "back", "--torch-dtype", "auto")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["iteration"] == "release"
    assert_same_weights(weights_of(tmp_path / "back"), weights_of(tmp_path / "hf"))


def test_wrong_input_ends_with_status_2_and_an_error_document(tmp_path):
    error_file = tmp_path / "error.json"
    done = bridge(*("convert", "--hf", tmp_path, "--output", tmp_path / "out"), **{ERROR_FILE_VARIABLE: error_file})
    assert done.returncode == EXIT_INPUT
    error = error_from_json(error_file.read_text())
    assert isinstance(error, SourceError)
    assert str(tmp_path / "config.json") in str(error) and str(error) in done.stderr
    assert not (tmp_path / "out").exists()
