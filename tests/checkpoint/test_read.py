"""Tensors are read back whole or in part. The files hold no code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint import read as read_module
from sleeptrain.checkpoint.place import Place, Placed, Slice
from sleeptrain.checkpoint.read import Read, TensorFiles
from sleeptrain.checkpoint.tensor_file import write_tensors
from sleeptrain.errors import DataError
from tests.checkpoint.contents import InMemory, tensors
from tests.checkpoint.test_folder import SHARD
from tests.checkpoint.worlds import save


def test_tensors_are_read_back_without_pickle(tmp_path: Path) -> None:
    written = save(tmp_path, 3)
    files = TensorFiles(tmp_path / "step-00000003")
    assert {name: form.shape for name, form in files.forms.items()} == {n: tuple(t.shape) for n, t in written.items()}
    assert all(torch.equal(files.tensor(name), tensor) for name, tensor in written.items())
    assert all(torch.equal(tensor, written[name]) for name, tensor in tensors(tmp_path / "step-00000003").items())
    assert not any(path.name == ".metadata" for path in (tmp_path / "step-00000003").iterdir()), "nothing pickled"


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    save(tmp_path, 3)
    os.truncate(tmp_path / "step-00000003" / SHARD, 100)
    with pytest.raises(DataError, match="step-00000003 cannot be read"):
        TensorFiles(tmp_path / "step-00000003")


def test_one_tensor_is_read_by_its_name(tmp_path: Path) -> None:
    written = save(tmp_path, 3)
    files = TensorFiles(tmp_path / "step-00000003")
    assert torch.equal(files.tensor("model/weight2"), written["model/weight2"])
    form = files.forms["optim/adamw/weight0/step"]
    assert (form.shape, form.dtype) == ((), torch.float32)


WHOLE = torch.arange(6 * 5 * 8.0).view(6, 5, 8)


def write_fragments(folder: Path, cuts: list[Place]) -> TensorFiles:
    """WHOLE in a file for each cut."""
    named = InMemory({"w": WHOLE})
    for index, place in enumerate(cuts):
        with open(folder / f"shard-{index:05d}.safetensors", "wb") as file:
            write_tensors(file, {"w": Placed(named.elements("w", place), place)})
    return TensorFiles(folder)


def layouts() -> dict[str, list[Place]]:
    """Ways to cut WHOLE: not at all, into columns of two ranks, and these into five fragments each."""
    ranks = [{2: [(0, 2), (4, 6)]}, {2: [(2, 4), (6, 8)]}]
    columns = [Place.of(Slice.cut(WHOLE.shape, ranges)) for ranges in ranks]
    return {
        "whole": [Place.whole(WHOLE.shape)],
        "columns": columns,
        "fragments": [place.share(i, 5) for place in columns for i in range(5)],
    }


@pytest.mark.parametrize("gap", [0, 2**12])
@pytest.mark.parametrize("cuts", layouts())
def test_any_elements_are_read_from_any_fragments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: str, gap: int
) -> None:
    monkeypatch.setattr(read_module, "GAP", gap)
    files, expected = write_fragments(tmp_path, layouts()[cuts]), InMemory({"w": WHOLE})
    assert torch.equal(files.tensor("w"), WHOLE)
    for place in [place for places in layouts().values() for place in places]:
        assert torch.equal(files.elements("w", place), expected.elements("w", place))


def count_reads(patch: pytest.MonkeyPatch, count: Callable[[int], object]) -> None:
    """Calls `count` with the number of bytes of each read."""
    plain = read_module.open_ranges

    @contextmanager
    def counted(path: Path) -> Iterator[Read]:
        with plain(path) as read:
            yield lambda offset, size: (count(size), read(offset, size))[1]

    patch.setattr(read_module, "open_ranges", counted)


def test_no_more_is_read_than_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, sizes = write_fragments(tmp_path, layouts()["columns"]), list[int]()
    count_reads(monkeypatch, sizes.append)
    rows = Slice.cut(WHOLE.shape, {0: [(2, 4)]})
    files.elements("w", Place.of(rows))
    assert sizes == [2 * 5 * 4 * 4] * 2, "from each file a range of its rows"
    sizes.clear()
    monkeypatch.setattr(read_module, "GAP", 0)
    files.elements("w", Place.of(Slice.cut(WHOLE.shape, {2: [(0, 2)]})))
    assert sizes == [2 * 4] * 30, "half of each row of one file"


def test_fragments_that_are_missing_or_do_not_go_with_each_other_are_refused(tmp_path: Path) -> None:
    cuts = layouts()["fragments"]
    with pytest.raises(DataError, match="does not hold each element of w once"):
        write_fragments(tmp_path, cuts[1:])
    write_fragments(tmp_path, cuts)
    with open(tmp_path / "more.safetensors", "wb") as file:
        write_tensors(file, {"w": Placed(torch.ones(2), Place(Slice.cut((9,)), 0, 2))})
    with pytest.raises(DataError, match="fragments of w that do not go with each other"):
        TensorFiles(tmp_path)


def test_an_element_that_is_there_twice_does_not_hide_one_that_is_missing(tmp_path: Path) -> None:
    cuts = layouts()["fragments"]
    files = write_fragments(tmp_path, [cuts[0], *cuts[:-1]])
    with pytest.raises(DataError, match="lacks elements of w"):
        files.elements("w", cuts[-1])
