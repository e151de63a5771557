"""Wrong input through the real command line: status 2, every finding named at once, nothing written, no code run."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mcore.bridge.__main__ import app
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_config import read_hf_config
from mcore.bridge.hf_headers import read_headers
from mcore.bridge.plan import mcore_shapes_of, plan_convert
from mcore.child import run_as_child
from mcore.errors import EXIT_INPUT, EXIT_OK, InputError, SourceError
from tests.hf_folders import write_hf_folder

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture
def hf(tmp_path):
    """A sound model, one file, that a test may damage."""
    write_hf_folder(tmp_path / "hf", "llama")
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path):
    """A sound model in several files."""
    write_hf_folder(tmp_path / "hf", "llama", max_shard_size="150KB")
    return tmp_path / "hf"


@pytest.fixture
def convert(monkeypatch, capfd):
    """Run the command as a stage process does; gives its exit status and the findings that it prints."""

    def run(hf, *options):
        words = ["convert", "--hf", str(hf), "--output", str(hf.parent / "out"), *options]
        monkeypatch.setattr(sys, "argv", ["mcore.bridge", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_as_child(app)
        text = capfd.readouterr().err
        assert "Traceback" not in text, text
        return ended.value.code, [line[4:] for line in text.splitlines() if line.startswith("  - ")]

    return run


@pytest.fixture
def refused(convert):
    """Run the command on wrong input; gives its findings."""

    def run(hf, *options):
        before = sorted(hf.parent.rglob("*"))
        status, findings = convert(hf, *options)
        assert status == EXIT_INPUT and findings
        assert sorted(hf.parent.rglob("*")) == before
        return findings

    return run


def change_config(hf, **changes):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | changes))


def change_weights(hf, change):
    tensors = load_file(hf / FILE)
    change(tensors)
    save_file(tensors, hf / FILE, metadata={"format": "pt"})


def change_header(hf, change):
    """Rewrite the header; the data stays."""
    data = (hf / FILE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (hf / FILE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_index(hf, change):
    index = json.loads((hf / INDEX).read_text())
    change(index["weight_map"])
    (hf / INDEX).write_text(json.dumps(index))


def one(findings, *parts):
    """The only finding, which has all of these parts."""
    (finding,) = findings
    assert all(part in finding for part in parts), finding


def test_sound_input_goes_through(hf, convert):
    assert convert(hf) == (EXIT_OK, [])


def test_a_hub_cache_of_links_goes_through(sharded, convert, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    assert convert(sharded) == (EXIT_OK, [])


class TestFiles:
    def test_cut_shards_are_all_named(self, sharded, refused):
        first, second, *_ = sorted(sharded.glob("*.safetensors"))
        for shard in (first, second):
            os.truncate(shard, shard.stat().st_size - 8)
        findings = refused(sharded)
        assert len(findings) == 2 and all("cut short" in finding for finding in findings)

    def test_a_shard_cut_within_its_header(self, hf, refused):
        os.truncate(hf / FILE, 100)
        one(refused(hf), FILE, "100 bytes without a whole header")

    def test_an_index_that_names_a_missing_file(self, sharded, refused):
        gone = sorted(sharded.glob("*.safetensors"))[1]
        gone.unlink()
        one(refused(sharded), gone.name, "expected a file, as the index puts", "found none")

    @pytest.mark.parametrize(
        "file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\0b/../c.safetensors"]
    )
    def test_a_path_outside_the_folder(self, sharded, refused, file, tmp_path):
        save_file({NORM: torch.ones(64)}, tmp_path / "secret.safetensors")
        change_index(sharded, lambda weight_map: weight_map.update({NORM: file}))
        expected = f"expected names of files in the folder, found {file!r}"
        assert any(expected in finding for finding in refused(sharded))

    @pytest.mark.parametrize(
        "file", ["a\0.safetensors", "\ud800.safetensors", "x" * 5000 + ".safetensors", ".safetensors"]
    )
    def test_a_name_that_no_file_has(self, sharded, refused, file):
        change_index(sharded, lambda weight_map: weight_map.update({NORM: file}))
        assert any("expected a file, as the index puts 1 tensors into it" in finding for finding in refused(sharded))

    def test_an_index_of_other_things_than_names(self, sharded, refused):
        change_index(sharded, lambda weight_map: weight_map.update({NORM: 3, UP: None}))
        findings = refused(sharded)
        assert {f for f in findings if "expected a file name in the index" in f} == {
            f"{NORM}: expected a file name in the index, found 3",
            f"{UP}: expected a file name in the index, found None",
        }

    def test_an_index_that_names_a_tensor_twice(self, sharded, refused):
        text = (sharded / INDEX).read_text().replace('"weight_map": {', f'"weight_map": {{"{NORM}": "x.safetensors",')
        (sharded / INDEX).write_text(text)
        one(refused(sharded), INDEX, f"named twice: {NORM}")

    @pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"weight_map": []}', "\xff", ""])
    def test_an_index_that_is_none(self, sharded, refused, text):
        (sharded / INDEX).write_text(text, encoding="latin-1")
        one(refused(sharded), INDEX, "a JSON object with a weight_map")

    def test_a_tensor_in_two_files(self, sharded, refused):
        first, second, *_ = sorted(sharded.glob("*.safetensors"))
        tensors = load_file(second)
        name = next(iter(load_file(first)))
        save_file(tensors | {name: torch.ones(2)}, second)
        one(refused(sharded), f"{name}: expected {second.name} in the index, which holds it, found {first.name}")

    def test_a_folder_without_weights_or_anything(self, hf, refused, tmp_path):
        (hf / FILE).unlink()
        one(refused(hf), f"expected {FILE} or {INDEX}", "Only safetensors are read")
        (tmp_path / "empty").mkdir()
        findings = refused(tmp_path / "empty")
        assert len(findings) == 2 and "found no files" in findings[1]

    def test_no_folder(self, refused, tmp_path, hf):
        one(refused(tmp_path / "nothing"), "config.json", "No such file")
        one(refused(hf / "config.json"), "config.json", "Not a directory")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


class TestPickles:
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_only_a_pickle(self, hf, refused, tmp_path, name):
        (hf / FILE).unlink()
        (hf / name).write_bytes(pickle.dumps({"a": Bomb(tmp_path / "ran")}))
        one(refused(hf), name, "pickled weights can run code")

    def test_an_index_of_pickles(self, sharded, refused, tmp_path):
        (sharded / "pytorch_model-1.bin").write_bytes(pickle.dumps({"a": Bomb(tmp_path / "ran")}))
        change_index(sharded, lambda weight_map: weight_map.update({NORM: "pytorch_model-1.bin"}))
        assert any("'pytorch_model-1.bin'. Only safetensors are read" in finding for finding in refused(sharded))

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_a_pickle_of_the_right_name(self, hf, refused, tmp_path, protocol):
        (hf / FILE).write_bytes(pickle.dumps({"a": Bomb(tmp_path / "ran"), "b": b"1" * 2000}, protocol))
        one(refused(hf), FILE, "found what looks like a pickle")

    def test_an_archive_of_the_right_name(self, hf, refused, tmp_path):
        with zipfile.ZipFile(hf / FILE, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb(tmp_path / "ran")))
        one(refused(hf), FILE, "found what looks like a pickle")


class TestHeaders:
    @pytest.mark.parametrize("length", [0, 10**8, 10**8 + 1, 2**63, 2**64 - 1])
    def test_a_length_that_can_not_be(self, hf, refused, length):
        data = (hf / FILE).read_bytes()
        (hf / FILE).write_bytes(struct.pack("<Q", length) + data[8:])
        one(refused(hf), FILE, "without a whole header")

    @pytest.mark.parametrize(
        ("header", "expected"),
        [
            (b"{" + b'"a":{' * 200_000, "RecursionError"),
            (b"[" * 500_000, "RecursionError"),
            (b'{"a":' + b"9" * 10_000 + b"}", "Exceeds the limit"),
            (b"{}garbage", "JSONDecodeError"),
            (b'{"\xff": 1}', "UnicodeDecodeError"),
            (b"null", "a JSON object as header"),
        ],
    )
    def test_a_header_that_is_none(self, hf, refused, header, expected):
        change_header(hf, lambda before: header)
        one(refused(hf), FILE, expected)

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [-64], "data_offsets": [0, -256]},
            {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**66]},
            {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]},
            {"dtype": "F32", "shape": [10**400], "data_offsets": [0, 4 * 10**400]},
            {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [True, 64], "data_offsets": [0, 256]},
            {"dtype": "F32", "shape": [64.0], "data_offsets": [0, 256]},
            {"dtype": "F32", "shape": "64", "data_offsets": [0, 256]},
            {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [64], "data_offsets": [256, 0]},
            {"dtype": "F32", "shape": [64], "data_offsets": [0, 256, 512]},
            {"dtype": "F32", "shape": [64], "data_offsets": {"0": 256}},
            {"dtype": ["F32"], "shape": [64], "data_offsets": [0, 256]},
            {"dtype": "F33", "shape": [64], "data_offsets": [0, 256]},
            {"dtype": "F32", "shape": [64]},
            {},
            [],
            7,
            None,
            "x",
        ],
    )
    def test_an_entry_that_is_none(self, hf, refused, entry):
        change_header(hf, lambda header: header | {NORM: entry})
        assert any(f"{FILE}: {NORM}: expected dtype, shape and data_offsets" in finding for finding in refused(hf))

    def test_a_name_that_stands_twice(self, hf, refused):
        change_header(hf, lambda header: json.dumps(header).replace(UP, NORM).encode())
        one(refused(hf), FILE, f"named twice: {NORM}")

    def test_tensors_that_overlap(self, hf, refused):
        def overlap(header):
            header[UP]["data_offsets"] = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
            return header

        change_header(hf, overlap)
        assert any("expected data from byte" in finding for finding in refused(hf))

    def test_a_gap_and_a_tail(self, hf, refused):
        with (hf / FILE).open("ab") as file:
            file.write(b"12345678")
        one(refused(hf), FILE, "bytes, found")


class TestWeights:
    def test_wrong_shapes_dtypes_names_all_at_once(self, hf, refused):
        def change(tensors):
            tensors[UP] = tensors[UP].T.contiguous()
            tensors[NORM] = torch.ones(64, dtype=torch.int32)
            tensors["model.layers.0.input_layernorm.weight"] = torch.ones(64, dtype=torch.float64)
            tensors["model.layers.2.input_layernorm.weight"] = torch.ones(64, dtype=torch.float16)
            tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(0, 64)
            tensors["model.layers.3.mlp.down_proj.weight"] = torch.tensor(1.0)
            tensors["model.layers.4.mlp.up_proj.weight"] = torch.ones(1)
            del tensors["model.layers.1.input_layernorm.weight"]

        change_weights(hf, change)
        findings = refused(hf)
        text = "\n".join(findings)
        for expected in (
            f"hf {UP}: expected [96, 64], found [64, 96]",
            f"hf {NORM}: expected one of bfloat16, float16, float32, found int32",
            "hf model.layers.0.input_layernorm.weight: expected one of bfloat16, float16, float32, found float64",
            "input_layernorm.weight), float16 (model.layers.2",
            "hf model.layers.3.mlp.up_proj.weight: expected [96, 64], found [0, 64]",
            "hf model.layers.3.mlp.down_proj.weight: expected [64, 96], found []",
            "hf model.layers.4.mlp.up_proj.weight: expected a row of the llama table",
            "hf model.layers.1.input_layernorm.weight: expected a tensor [64], found none",
        ):
            assert expected in text or expected.startswith("input_"), (expected, text)
        assert "expected one dtype" in text

    @pytest.mark.parametrize("options", [(), ("--workers", "3")])
    def test_numbers_that_are_not_finite_are_named_in_every_tensor(self, hf, refused, options):
        def change(tensors):
            tensors[UP][3, 4:6] = torch.nan
            tensors["model.layers.2.self_attn.v_proj.weight"][31, 63] = -torch.inf
            tensors["model.embed_tokens.weight"][249, 0] = torch.inf
            tensors["model.embed_tokens.weight"][249, 1] = torch.nan
            tensors[NORM][0] = torch.nan

        change_weights(hf, change)
        assert sorted(refused(hf, *options)) == [
            f"hf {name}: expected finite numbers, found {found}. The weights are damaged; fetch them again."
            for name, found in (
                ("model.embed_tokens.weight", "1 NaN and 1 infinities, the first at [249, 0]"),
                (UP, "2 NaN and 0 infinities, the first at [3, 4]"),
                ("model.layers.2.self_attn.v_proj.weight", "0 NaN and 1 infinities, the first at [31, 63]"),
                (NORM, "1 NaN and 0 infinities, the first at [0]"),
            )
        ]

    def test_a_tied_flag_that_lies(self, hf, refused):
        change_config(hf, tie_word_embeddings=True)
        one(refused(hf), "hf lm_head.weight: expected the same bytes as model.embed_tokens.weight")

    def test_a_tied_copy_that_differs_in_its_last_number(self, hf, refused, monkeypatch):
        def change(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["lm_head.weight"][-1, -1] += 1

        monkeypatch.setattr("mcore.bridge.check.ROWS_COMPARED", 100)
        change_weights(hf, change)
        change_config(hf, tie_word_embeddings=True)
        one(refused(hf), "hf lm_head.weight: expected the same bytes as model.embed_tokens.weight")

    def test_an_untied_flag_that_lies(self, hf, refused):
        change_weights(hf, lambda tensors: tensors.pop("lm_head.weight"))
        one(refused(hf), "hf lm_head.weight: expected a tensor [250, 64], found none", "or config.json is wrong")


class TestConfig:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "expected JSON"),
            ("[]", "a JSON object is needed, not list"),
            ("{" * 3, "expected JSON"),
            ('{"a":' * 100_000, "maximum recursion"),
            ('{"rms_norm_eps": NaN}', "NaN is no number"),
            ('{"rope_theta": -Infinity}', "-Infinity is no number"),
            ('{"rms_norm_eps": 1e999}', "1e999 is no number"),
            ('{"vocab_size": ' + "9" * 5000 + "}", "Exceeds the limit"),
            ("\xff", "utf-8"),
        ],
    )
    def test_a_config_that_is_none(self, hf, refused, text, expected):
        (hf / "config.json").write_text(text, encoding="latin-1")
        one(refused(hf), expected)

    def test_every_value_of_a_wrong_kind_is_named(self, hf, refused):
        wrong = {
            "num_hidden_layers": 10**9,
            "vocab_size": 10**30,
            "hidden_size": 64.0,
            "head_dim": "8",
            "rms_norm_eps": "1e-5",
            "rope_theta": [10000],
            "tie_word_embeddings": "false",
            "attention_bias": 1,
            "layer_types": "full_attention",
            "rope_scaling": [],
            "rope_parameters": {"factor": "2", "rope_type": 3},
            "quantization_config": "fp8",
            "architectures": "LlamaForCausalLM",
            "model_type": 5,
        }
        change_config(hf, **wrong)
        findings = refused(hf)
        assert len(findings) == len(wrong) + 1  # two in rope_parameters
        assert all(any(f"config.json: {key}" in finding for finding in findings) for key in wrong)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer"),
            ({"num_hidden_layers": -4}, "num_hidden_layers: expected an integer from 0 to 1024"),
            ({"num_hidden_layers": 1000}, "num_hidden_layers: expected less than the"),
            ({"hidden_size": 2**31 - 1, "head_dim": 8}, "config.json and weights disagree"),
            ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 8, "intermediate_size": 2**31 - 1}, "disagree"),
            ({"num_attention_heads": 7}, "divisor of num_attention_heads 7"),
            ({"num_key_value_heads": 3}, "divisor of num_attention_heads 8"),
            ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
            ({"rms_norm_eps": None}, "rms_norm_eps"),
            ({"architectures": []}, "a list with one class name"),
            ({"architectures": [{"a": 1}]}, "architectures: expected a list of texts"),
            ({"architectures": None}, "a list with one class name"),
            ({"layer_types": [{}]}, "layer_types: expected a list of texts"),
            (
                {"rope_scaling": {"rope_type": "longrope", "long_factor": [[]]}},
                "long_factor: expected a list of numbers",
            ),
            ({"rope_parameters": {"rope_type": "magic", "rope_theta": 1.0}}, "magic"),
            ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "factor"),
            ({"max_position_embeddings": -1}, "max_position_embeddings"),
            ({"model_type": "nothing"}, "config.json"),
        ],
    )
    def test_a_config_that_can_not_be(self, hf, refused, changes, expected):
        change_config(hf, **changes)
        assert any(expected in finding for finding in refused(hf))

    def test_an_architecture_that_is_not_known(self, hf, refused):
        change_config(hf, architectures=["GPT2LMHeadModel"])
        one(refused(hf), "expected one of", "LlamaForCausalLM", "found 'GPT2LMHeadModel'")

    def test_code_that_the_folder_brings_is_not_run(self, hf, refused, tmp_path):
        (hf / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        change_config(
            hf,
            architectures=["OwnForCausalLM"],
            model_type="own",
            auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM", "AutoConfig": "modeling_own.OwnConfig"},
        )
        one(refused(hf), "found 'OwnForCausalLM'", "The code that the folder brings (auto_map) is never run")


def test_all_kinds_come_at_once(sharded, refused):
    """Config, files, and what of the weights can be told although one of the files is cut."""
    first, last, *_ = sorted(sharded.glob("*.safetensors"))
    os.truncate(first, first.stat().st_size - 8)
    tensors = load_file(last)
    name = min(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    save_file(tensors | {name: tensors[name].T.contiguous()}, last)
    change_index(sharded, lambda weight_map: weight_map.update(ghost=last.name, outside="../x.safetensors"))
    change_config(sharded, hidden_act="gelu", quantization_config={"quant_method": "fp8"})
    text = "\n".join(refused(sharded))
    for part in (
        f"{first.name}: expected",
        f"ghost: expected in {last.name}, as the index says, found not there",
        "'../x.safetensors'",
        "config.json: hidden_act",
        "quantization_config.weight_block_size",
        f"hf {name}: expected",
    ):
        assert part in text, text
    assert "found none" not in text  # what is missing is missing because of the cut file


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound folder, its file's bytes, and its plan."""
    folder = tmp_path_factory.mktemp("sound")
    write_hf_folder(folder, "llama")
    return folder, (folder / FILE).read_bytes(), planned(folder)


def planned(folder):
    config = read_hf_config(folder)
    family, dims = family_of_config(config), dims_of(config)
    return plan_convert(family, dims, hf=read_headers(folder), mcore_shapes=mcore_shapes_of(family, dims))


DAMAGE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same_or_refused(sound, data):
    """A header may grow by a space, say: the bytes of all tensors are then so much further behind."""
    folder, sound_data, before = sound
    (folder / FILE).write_bytes(data)
    try:
        after = planned(folder)
    except InputError as error:
        assert error.problems and str(error)
    else:
        grown = len(data) - len(sound_data)
        moved = {
            name: replace(tensor, stored=replace(tensor.stored, offset=tensor.stored.offset + grown))
            for name, tensor in before.hf.items()
        }
        assert after == replace(before, hf=moved)


@DAMAGE
@given(draw=st.data())
def test_any_byte_of_a_header_that_changes_is_refused_or_makes_no_difference(sound, draw):
    _, data, _ = sound
    (length,) = struct.unpack("<Q", data[:8])
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        changed[draw.draw(st.integers(0, 7 + length))] = draw.draw(st.integers(0, 255))
    same_or_refused(sound, bytes(changed))


@DAMAGE
@given(draw=st.data())
def test_bytes_of_a_header_that_go_or_come_are_refused_or_make_no_difference(sound, draw):
    _, data, _ = sound
    (length,) = struct.unpack("<Q", data[:8])
    start = draw.draw(st.integers(0, 8 + length))
    end = draw.draw(st.integers(start, min(start + 40, 8 + length)))
    header = data[:start] + draw.draw(st.binary(max_size=20)) + data[end : 8 + length]
    if draw.draw(st.booleans()) and len(header) > 8:  # with the length put right
        header = struct.pack("<Q", len(header) - 8) + header[8:]
    same_or_refused(sound, header + data[8 + length :])


def test_a_space_more_in_a_header_makes_no_difference(sound):
    _, data, _ = sound
    (length,) = struct.unpack("<Q", data[:8])
    at = data.index(b'"dtype"')
    same_or_refused(sound, struct.pack("<Q", length + 1) + data[8:at] + b" " + data[at:])
    planned(sound[0])  # not refused


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.just(NORM),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", NORM, "weight_map"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@DAMAGE
@given(content=JSON)
def test_whatever_json_a_header_or_an_index_holds(tmp_path, content):
    text = json.dumps(content).encode()
    (tmp_path / INDEX).write_bytes(text)
    (tmp_path / FILE).write_bytes(struct.pack("<Q", len(text)) + text)
    for _ in (FILE, INDEX):
        try:
            tensors = read_headers(tmp_path)
        except SourceError as error:
            assert error.problems
        else:
            assert all(tensor.num_bytes == 0 for tensor in tensors.values())  # there is no data
        (tmp_path / FILE).unlink(missing_ok=True)
