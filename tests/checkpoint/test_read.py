"""Tensors are read back one at a time. The files hold no code."""

from __future__ import annotations

import os
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.errors import DataError
from tests.checkpoint.contents import tensors
from tests.checkpoint.test_folder import SHARD
from tests.checkpoint.worlds import save


def test_tensors_are_read_back_one_at_a_time_and_without_pickle(tmp_path: Path) -> None:
    written = save(tmp_path, 3)
    files = TensorFiles(tmp_path / "step-00000003")
    assert {name: form.shape for name, form in files.forms.items()} == {n: tuple(t.shape) for n, t in written.items()}
    seen: dict[str, torch.Tensor] = {}
    references: list[weakref.ref[torch.Tensor]] = []

    def take(name: str, tensor: torch.Tensor) -> None:
        assert sum(ref() is not None for ref in references) <= 1, "the ones before are gone, but for the loop's last"
        references.append(weakref.ref(tensor))
        seen[name] = tensor.clone()

    files.read({name: partial(take, name) for name in written})
    assert all(torch.equal(seen[name], tensor) for name, tensor in written.items())
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
