from __future__ import annotations

import torch
from safetensors.torch import save_file

from mcore.bridge.hf_files import StoredRows
from mcore.bridge.hf_headers import read_headers

WEIGHTS = {
    "odd": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "wide": torch.randn(7, 2, generator=torch.Generator().manual_seed(1)),
    "norm": torch.randn(9, generator=torch.Generator().manual_seed(2)).half(),
}


def test_rows_are_read_where_they_are_sliced(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    for name, stored in read_headers(tmp_path).items():
        rows, tensor = StoredRows(stored), WEIGHTS[name]
        for window in (slice(None), slice(1, 2), slice(2, None), slice(0, 0), slice(1, 100)):
            assert torch.equal(rows[window], tensor[window])
            assert rows[window].dtype == tensor.dtype


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    StoredRows(read_headers(tmp_path)["wide"])[0:7].zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
