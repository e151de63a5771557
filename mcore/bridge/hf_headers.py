"""Headers of a Hugging Face folder's safetensors files: every tensor's name, dtype, shape and place, checked before a
byte of data is read. No torch here, so that a run can be checked before anything starts.

Source: the format's description in the safetensors README (0.6): 8 bytes of header length, little endian; a JSON
object of tensors and `__metadata__`; the tensors' bytes, without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore.bridge.dims import Shape
from mcore.errors import Problem, SourceError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}
"""torch's name and the bytes of each dtype that a file may hold."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: torch's name of its dtype, and the place of its bytes."""

    name: str
    dtype: str
    shape: Shape
    file: Path
    offset: int
    num_bytes: int


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder's safetensors, by name.

    Raises:
        SourceError: Files are missing, cut short, damaged, or contradict the index. Lists every finding.
    """
    problems: list[Problem] = []
    if (folder / SINGLE_FILE).is_file():
        tensors, problems = _read_header(folder / SINGLE_FILE)
    elif (folder / INDEX_FILE).is_file():
        tensors = _read_indexed(folder, problems)
    else:
        found = ", ".join(sorted(path.name for path in folder.glob("*") if path.is_file())) or "no files"
        raise SourceError(
            "the model has no weights that can be read",
            [
                Problem(
                    str(folder),
                    f"{SINGLE_FILE} or {INDEX_FILE}",
                    found,
                    "Only safetensors are read: pickled weights can run code when they are opened.",
                )
            ],
        )
    if problems:
        raise SourceError("the model's weights are not whole", problems)
    return tensors


def _read_indexed(folder: Path, problems: list[Problem]) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
        claims = [(str(name), file) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        problems.append(Problem(INDEX_FILE, "a JSON object with a weight_map", f"{type(exc).__name__}: {exc}"))
        return {}
    tensors: dict[str, StoredTensor] = {}
    for file in sorted({file for _, file in claims if isinstance(file, str)}):
        claimed = {name for name, of in claims if of == file}
        if Path(file).name != file or file in {".", ".."}:
            problems.append(Problem(INDEX_FILE, "names of files in the folder", repr(file)))
            continue
        if not (folder / file).is_file():
            problems.append(Problem(file, f"a file, as the index puts {len(claimed)} tensors into it", "none"))
            continue
        held, found = _read_header(folder / file)
        problems += found
        if found and not held:
            continue
        problems += [
            Problem(name, f"in {file}, as the index says", "not there") for name in sorted(claimed - set(held))
        ]
        problems += [Problem(name, "an entry in the index", f"only {file}") for name in sorted(set(held) - claimed)]
        tensors |= {name: held[name] for name in claimed & held.keys()}
    problems += [Problem(name, "a file name in the index", repr(of)) for name, of in claims if not isinstance(of, str)]
    return tensors


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], list[Problem]]:
    """Tensors of one file, and everything that is wrong with it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (-1,)
            if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                return {}, [Problem(path.name, "a safetensors file", f"{size} bytes without a whole header")]
            header = json.loads(file.read(length), object_pairs_hook=_no_repeats)
    except (OSError, ValueError) as exc:
        return {}, [Problem(path.name, "a safetensors header", f"{type(exc).__name__}: {exc}")]
    if not isinstance(header, dict):
        return {}, [Problem(path.name, "a JSON object as header", type(header).__name__)]
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    problems: list[Problem] = []
    for name, entry in header.items():
        place = f"{path.name}: {name}"
        try:
            stored = _stored(name, entry, path, data_start=8 + length)
        except (KeyError, TypeError, ValueError) as exc:
            problems.append(Problem(place, "dtype, shape and data_offsets", repr(entry)[:120], str(exc)))
            continue
        tensors[name] = stored
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end and not problems:
            problems.append(Problem(f"{path.name}: {tensor.name}", f"data from byte {end}", f"from {tensor.offset}"))
        end = max(end, tensor.offset + tensor.num_bytes)
    if size != end and not (size > end and problems):
        fix = "The file is cut short; fetch it again." if size < end else ""
        problems.append(Problem(path.name, f"{end} bytes", f"{size} bytes", fix))
    return tensors, problems


def _stored(name: str, entry: Any, path: Path, *, data_start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"Unknown dtype {entry['dtype']!r}.")
    dtype, item_bytes = DTYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError("Sizes and offsets must be integers from 0 on.")
    num_bytes = math.prod(shape) * item_bytes
    if end - start != num_bytes:
        raise ValueError(f"{dtype} {list(shape)} takes {num_bytes} bytes, not {end - start}.")
    return StoredTensor(name, dtype, shape, path, data_start + start, num_bytes)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"named twice: {', '.join(sorted({name for name in names if names.count(name) > 1}))}")
    return entries
