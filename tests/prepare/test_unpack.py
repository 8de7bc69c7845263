"""The content of packed files, and packed files that are truncated."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.unpack import unpacked
from tests.prepare.test_readers import HARD, PACK, jsonl, read


@pytest.mark.parametrize("cut", [1, 5, 40])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_never_counts_as_complete(tmp_path: Path, suffix: str, cut: int) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](jsonl(HARD))[:-cut])
    with pytest.raises(DataError, match=f"a.jsonl{suffix}: .*cut short"):
        read(path)


@pytest.mark.parametrize("suffix", PACK)
def test_every_packing_gives_the_packed_bytes(tmp_path: Path, suffix: str) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / f"a.txt{suffix}").write_bytes(PACK[suffix](content))
    (source,) = named_inputs([str(tmp_path / f"a.txt{suffix}")])
    with unpacked(source) as file:
        assert file.read(3) == content[:3] and file.read() == content[3:] and file.read() == b""


def test_zstd_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"no zstd at all")
    (source,) = named_inputs([str(path)])
    with unpacked(source) as file, pytest.raises(DataError, match=r"a\.txt\.zst: damaged: "):
        file.read()


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").touch()
    (source,) = named_inputs([str(tmp_path / "a.txt.zst")])
    with unpacked(source) as file:
        assert file.read() == b""
