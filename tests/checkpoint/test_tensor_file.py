"""A file of tensors is one that any reader of safetensors takes, and its header says where fragments belong."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sleeptrain.checkpoint.place import Place, Placed, Slice
from sleeptrain.checkpoint.tensor_file import DTYPES, Stored, header_size, parse_header, write_tensors

COLUMNS = Slice.cut((4, 6), {1: [(0, 1), (4, 6)]})
FRAGMENT = Placed(torch.arange(5.0), Place(COLUMNS, 2, 5))


def written(path: Path, tensors: dict[str, torch.Tensor | Placed]) -> dict[str, object]:
    with open(path, "wb") as file:
        return write_tensors(file, tensors)


def parsed(content: bytes) -> list[Stored]:
    size = header_size(content[:8], len(content))
    return parse_header(content[8 : 8 + size], len(content))


def test_other_readers_take_it_and_the_checksum_is_that_of_the_file(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(3).to(dtype) for dtype in DTYPES.values()}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3), "columns": torch.arange(6).view(2, 3).T}
    entry = written(tmp_path / "x", {**tensors, "w": FRAGMENT})
    content = (tmp_path / "x").read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    found = load_file(tmp_path / "x")
    assert torch.equal(found.pop("w@2"), FRAGMENT.tensor)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())


def test_a_header_says_where_tensors_and_fragments_are(tmp_path: Path) -> None:
    written(tmp_path / "x", {"w": FRAGMENT, "whole": torch.ones(2, 3), "byte": torch.ones(1, dtype=torch.uint8)})
    content = (tmp_path / "x").read_bytes()
    by_name = {stored.name: stored for stored in parsed(content)}
    assert by_name["w"].place == FRAGMENT.place and by_name["whole"].place == Place.whole((2, 3))
    at = by_name["w"].offset
    assert torch.frombuffer(bytearray(content[at : at + 20]), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4]
    with safe_open(tmp_path / "x", "pt") as file:
        fragments = json.loads(file.metadata()["fragments"])
    assert fragments == {"w@2": {"tensor": "w", "shape": [4, 6], "ranges": {"1": [[0, 1], [4, 6]]}, "start": 2}}


def test_a_file_of_the_safetensors_package_holds_whole_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int64)}, tmp_path / "x")
    found = {stored.name: (stored.place, stored.dtype) for stored in parsed((tmp_path / "x").read_bytes())}
    assert found == {"a": (Place.whole((2, 3)), torch.float32), "b": (Place.whole((4,)), torch.int64)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"start": 2', b'"start": 9'),
        (b"[[0, 1], [4, 6]]", b"[[0, 1], [4, 7]]"),
        (b"[[0, 1], [4, 6]]", b"[[1, 0], [4, 6]]"),
        (b'"1": [[', b'"2": [['),
        (b'"shape": [4, 6]', b'"shape": [4, 1]'),
        (b'"data_offsets": [0, 20]', b'"data_offsets": [0, 24]'),
        (b'"F32"', b'"F99"'),
        (b'"shape": [5]', b'"shape": [-]'),
        (b'"shape": [5]', b'"shape": "5"'),
        (b'"tensor"', b'"nosret"'),
    ],
)
def test_a_damaged_header_is_refused(old: bytes, new: bytes) -> None:
    file = io.BytesIO()
    write_tensors(file, {"w": FRAGMENT})
    content, inner = file.getvalue(), [text.replace(b'"', b'\\"') for text in (old, new)]
    changed = content.replace(*inner) if inner[0] in content else content.replace(old, new)
    assert changed != content and len(changed) == len(content)
    with pytest.raises(ValueError):
        parsed(changed)


@pytest.mark.parametrize("content", [b"", b"\x08", (2**40).to_bytes(8, "little") + b"{}", b"\x03" + bytes(7) + b"{}"])
def test_what_is_no_safetensors_file_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parsed(content)
