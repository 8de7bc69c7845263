"""One safetensors file of a checkpoint: written as a stream with its checksum, and its header.

A tensor that is whole has its own name in the file. A fragment is a flat tensor `<name>@<start>`, and `fragments` in
the file's metadata says which elements of the whole tensor it is. The header is written and read here, because the
safetensors package neither gives checksums of what it writes nor says where in the file a tensor's bytes are, which
reads of byte ranges need. Other readers of safetensors read these files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import prod
from typing import Any, BinaryIO, NamedTuple

import torch

from sleeptrain.checkpoint.place import Place, Placed, Slice, Tensors, placed
from sleeptrain.kinds import is_count, list_of
from sleeptrain.small_files import parse_json

FRAGMENTS = "fragments"
HEADER_BYTES = 100 * 2**20  # the most that readers of safetensors take
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """Elements of a tensor in a file. offset: of their first byte in the file."""

    name: str
    place: Place
    dtype: torch.dtype
    offset: int


def write_tensors(file: BinaryIO, tensors: Tensors) -> dict[str, Any]:
    """Write tensors, which are on the CPU. Returns the file's entry of the manifest: {"bytes", "sha256"}."""
    digest, size = hashlib.sha256(), 0
    # The widest come first, so that all are aligned.
    ordered = sorted(((name, placed(t)) for name, t in tensors.items()), key=lambda item: -item[1].tensor.itemsize)
    for part in (memoryview(_header(ordered)), *(_bytes(t.tensor) for _, t in ordered)):
        digest.update(part)
        file.write(part)
        size += part.nbytes
    return {"bytes": size, "sha256": digest.hexdigest()}


def header_size(first: bytes, file_size: int) -> int:
    """The size of the header after the first eight bytes of a file. Raises ValueError if it cannot be."""
    size = int.from_bytes(first, "little")
    if len(first) < 8 or size > min(HEADER_BYTES, file_size - 8):
        raise ValueError("it is no safetensors file")
    return size


def parse_header(header: bytes, file_size: int) -> list[Stored]:
    """The tensors of a file. Raises ValueError: the header is not one, or does not fit the file."""
    try:
        entries = parse_json(header)
        metadata = entries.pop("__metadata__", {})
        fragments = parse_json(metadata.get(FRAGMENTS, "{}"))
        return [_stored(key, entry, fragments.get(key), len(header) + 8, file_size) for key, entry in entries.items()]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("its header is damaged") from error


def _header(tensors: list[tuple[str, Placed]]) -> bytes:
    entries: dict[str, Any] = {}
    fragments: dict[str, Any] = {}
    end = 0
    for name, (tensor, place) in tensors:
        key = name if place.is_whole else f"{name}@{place.start}"
        shape = place.shape if place.is_whole else (place.numel,)
        entries[key] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": (end, end + tensor.nbytes)}
        end += tensor.nbytes
        if not place.is_whole:
            fragments[key] = {"tensor": name, "shape": place.shape, "ranges": _ranges(place.slice)}
            fragments[key]["start"] = place.start
    metadata = {"format": "pt"} | ({FRAGMENTS: json.dumps(fragments)} if fragments else {})
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _ranges(part: Slice) -> dict[int, Any]:
    """The ranges of the dimensions that are cut."""
    return {d: r for d, r in enumerate(part.ranges) if r != ((0, part.shape[d]),)}


def _bytes(tensor: torch.Tensor) -> memoryview:
    content: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


def _stored(key: str, entry: Mapping[str, Any], fragment: Any, begin: int, file_size: int) -> Stored:
    dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    _require(list_of(is_count)(shape) and is_count(start) and is_count(end))
    numel = prod(shape)
    _require(start + numel * dtype.itemsize == end and begin + end <= file_size)
    if fragment is None:
        return Stored(key, Place.whole(shape), dtype, begin + start)
    name, whole, first = fragment["tensor"], fragment["shape"], fragment["start"]
    _require(isinstance(name, str) and list_of(is_count)(whole) and is_count(first))
    ranges = {int(dim): tuple((a, b) for a, b in found) for dim, found in fragment["ranges"].items()}
    for dim, found in ranges.items():
        _require(dim in range(len(whole)))
        _require(all(is_count(a) and is_count(b) and a <= b <= whole[dim] for a, b in found))
    place = Place(Slice.cut(whole, ranges), first, numel)
    _require(first + numel <= place.slice.numel)
    return Stored(name, place, dtype, begin + start)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("its header is damaged")
