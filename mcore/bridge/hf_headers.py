"""Headers of a Hugging Face folder's safetensors files: every tensor's name, dtype, shape and place, checked before a
byte of data is read. No torch here, so that a run can be checked before anything starts.

Source: the format's description in the safetensors README (0.6): 8 bytes of header length, little endian; a JSON
object of tensors and `__metadata__`; the tensors' bytes, without gaps.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore.bridge.dims import Shape
from mcore.errors import Problem, SourceError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""How a pickle of any protocol since 2 begins, and the zip archive that torch.save puts one into."""
ONLY_SAFETENSORS = "Only safetensors are read: pickled weights can run code when they are opened."
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_AXES = 64
"""torch's own limit."""

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


@dataclass(frozen=True, slots=True)
class Headers:
    """What the headers of a folder say: its tensors by name, and everything that is wrong with its files."""

    tensors: Mapping[str, StoredTensor]
    problems: tuple[Problem, ...]


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder's safetensors, by name.

    Raises:
        SourceError: Files are missing, cut short, damaged, or contradict the index. Lists every finding.
    """
    headers = scan_headers(folder)
    if headers.problems:
        raise SourceError("the model's weights can't be read", headers.problems)
    return dict(headers.tensors)


def scan_headers(folder: Path) -> Headers:
    """As `read_headers`, but what can be read of damaged weights comes along with the problems."""
    if (folder / SINGLE_FILE).is_file():
        tensors, problems = _read_header(folder / SINGLE_FILE)
        return Headers(tensors, tuple(problems))
    if (folder / INDEX_FILE).is_file():
        problems = []
        return Headers(_read_indexed(folder, problems), tuple(problems))
    if broken := [path.name for path in (folder / SINGLE_FILE, folder / INDEX_FILE) if os.path.lexists(path)]:
        found = "a folder, a link to nothing, or what else can't be read as a file"
        return Headers({}, tuple(Problem(name, "a file", found) for name in broken))
    found = ", ".join(sorted(path.name for path in folder.glob("*") if path.is_file())) or "no files"
    return Headers({}, (Problem(str(folder), f"{SINGLE_FILE} or {INDEX_FILE}", found[:1000], ONLY_SAFETENSORS),))


def _read_indexed(folder: Path, problems: list[Problem]) -> dict[str, StoredTensor]:
    try:
        index = json.loads((folder / INDEX_FILE).read_text(), object_pairs_hook=_no_repeats)
        claims = [(str(name), file) for name, file in index["weight_map"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        problems.append(Problem(INDEX_FILE, "a JSON object with a weight_map", _said(exc)))
        return {}
    tensors: dict[str, StoredTensor] = {}
    for file in sorted({file for _, file in claims if isinstance(file, str)}):
        claimed = {name for name, of in claims if of == file}
        if Path(file).name != file or file in {".", ".."}:
            problems.append(Problem(INDEX_FILE, "names of files in the folder", repr(file)[:200]))
            continue
        if not file.endswith(SUFFIX):
            problems.append(Problem(INDEX_FILE, f"names that end in {SUFFIX}", repr(file)[:200], ONLY_SAFETENSORS))
            continue
        if not _is_file(folder / file):
            problems.append(Problem(file[:200], f"a file, as the index puts {len(claimed)} tensors into it", "none"))
            continue
        held, found = _read_header(folder / file)
        problems += found
        if found and not held:
            continue
        problems += [
            Problem(name, f"in {file}, as the index says", "not there") for name in sorted(claimed - set(held))
        ]
        for name in sorted(set(held) - claimed):
            elsewhere = str(dict(claims).get(name, "none"))[:200]
            problems.append(Problem(name, f"{file} in the index, which holds it", elsewhere))
        tensors |= {name: held[name] for name in claimed & held.keys()}
    problems += [
        Problem(name, "a file name in the index", repr(of)[:200]) for name, of in claims if not isinstance(of, str)
    ]
    return tensors


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is longer than names may be
        return False


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], list[Problem]]:
    """Tensors of one file, and everything that is wrong with it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (-1,)
            if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                if prefix.startswith(PICKLES):
                    found = "what looks like a pickle"
                    return {}, [Problem(path.name, "a safetensors file", found, ONLY_SAFETENSORS)]
                return {}, [Problem(path.name, "a safetensors file", f"{size} bytes without a whole header")]
            header = json.loads(file.read(length), object_pairs_hook=_no_repeats)
    except (OSError, ValueError, RecursionError) as exc:
        return {}, [Problem(path.name, "a safetensors header", _said(exc))]
    if not isinstance(header, dict):
        return {}, [Problem(path.name, "a JSON object as header", type(header).__name__)]
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    problems: list[Problem] = []
    for name, entry in header.items():
        place = f"{path.name}: {name[:200]}"
        try:
            stored = _stored(name, entry, path, data_start=8 + length)
        except (KeyError, TypeError, ValueError) as exc:
            problems.append(Problem(place, "dtype, shape and data_offsets", repr(entry)[:120], _said(exc)))
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
    if not isinstance(entry, dict):
        raise TypeError("An object is needed.")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"Unknown dtype {str(entry['dtype'])[:40]!r}.")
    dtype, item_bytes = DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise TypeError("Shape must be a list, and data_offsets a list of two.")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *offsets)):
        raise ValueError("Sizes and offsets must be integers from 0 on.")
    if len(shape) > MAX_AXES or math.prod(size for size in shape if size) >= 2**63:
        raise ValueError("There is no such tensor: too many axes or numbers.")
    start, end = offsets
    num_bytes = math.prod(shape) * item_bytes
    if end - start != num_bytes:
        raise ValueError(f"{dtype} {shape} takes {num_bytes} bytes, not {end - start}.")
    return StoredTensor(name, dtype, tuple(shape), path, data_start + start, num_bytes)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        repeated = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"named twice: {', '.join(repeated)}")
    return entries


def _said(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"[:500]
