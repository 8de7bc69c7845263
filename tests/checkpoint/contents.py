"""A checkpoint as anybody reads it: safetensors files and JSON, without code of this package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from sleeptrain.checkpoint.place import Place, Tensors, placed
from sleeptrain.checkpoint.read import Form


class Found(NamedTuple):
    """A tensor of a file: elements of a whole tensor of this shape. positions: where they are in it, flattened."""

    name: str
    shape: Sequence[int]
    positions: np.ndarray
    values: torch.Tensor


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors by name, put together from what the files hold."""
    return joined(part for path in sorted(checkpoint.glob("*.safetensors")) for part in in_file(path))


def in_file(path: Path) -> Iterator[Found]:
    """The tensors and fragments in one file."""
    with safe_open(path, "pt") as file:
        fragments = json.loads((file.metadata() or {}).get("fragments", "{}"))
        for key in file.keys():  # noqa: SIM118
            values = file.get_tensor(key)
            about = fragments.get(key, {"tensor": key, "shape": values.shape, "ranges": {}, "start": 0})
            positions = _positions(about["shape"], {int(d): r for d, r in about["ranges"].items()})
            positions = positions[about["start"] : about["start"] + values.numel()]
            yield Found(about["tensor"], about["shape"], positions, values)


def joined(parts: Iterator[Found]) -> dict[str, torch.Tensor]:
    """Whole tensors from all their elements, of which each must be there once."""
    found: dict[str, torch.Tensor] = {}
    seen: dict[str, np.ndarray] = {}
    for name, shape, positions, values in parts:
        whole = found.setdefault(name, torch.zeros(tuple(shape), dtype=values.dtype))
        counts = seen.setdefault(name, np.zeros(prod(shape), dtype=int))
        whole.view(-1)[torch.from_numpy(positions)] = values.reshape(-1)
        counts[positions] += 1
    assert all((counts == 1).all() for counts in seen.values()), "each element is written once"
    return found


def of_shares(shares: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Whole tensors from the shares of all processes (`Engine.local_tensors`)."""
    every = [(name, *placed(share[name])) for share in shares for name in share]
    return joined(Found(name, place.shape, _elements(place), t.cpu()) for name, t, place in every)


def _elements(place: Place) -> np.ndarray:
    return _positions(place.shape, dict(enumerate(place.slice.ranges)))[place.start : place.start + place.numel]


def _positions(shape: Sequence[int], ranges: Mapping[int, Sequence[Sequence[int]]]) -> np.ndarray:
    """The positions in a flattened tensor of these ranges of indices in some of its dimensions."""
    indices = [np.concatenate([np.arange(a, b) for a, b in ranges.get(d, [(0, n)])]) for d, n in enumerate(shape)]
    return np.arange(prod(shape)).reshape(shape)[np.ix_(*indices)].reshape(-1) if shape else np.arange(1)


def contents(checkpoint: Path) -> dict[str, Any]:
    """`state.json`, and the tensors as {"model": .., "optim": {kind: {name: ..}}, "carried": .. or None}."""
    return json.loads((checkpoint / "state.json").read_text()) | nested(tensors(checkpoint))


def nested(named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The tree that the checkpoint names of tensors spell."""
    tree: dict[str, Any] = {"model": {}, "optim": {}, "carried": {}}
    for name, tensor in named.items():
        *path, leaf = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = tensor
    return tree | {"carried": tree["carried"] or None}


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, torch.Tensor]:
    """{the path to a leaf: the tensor} of a tree of tensors."""
    found: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        found |= {path + key: value} if isinstance(value, torch.Tensor) else flat(value, f"{path}{key}/")
    return found


class InMemory:
    """Tensors of a checkpoint that was never written (`sleeptrain.checkpoint.read.SavedTensors`)."""

    def __init__(self, named: Mapping[str, torch.Tensor]):
        self._named = named
        self.forms = {name: Form(tuple(t.shape), t.dtype) for name, t in named.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self._named[name].clone()

    def elements(self, name: str, place: Place) -> torch.Tensor:
        return self._named[name].reshape(-1)[torch.from_numpy(_elements(place))]
