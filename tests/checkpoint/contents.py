"""A checkpoint as anybody reads it: safetensors files and JSON, without code of this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sleeptrain.checkpoint.read import Form, Take


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors by name."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys(), "a tensor is in one file"
        found |= part
    return found


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

    def read(self, takes: Mapping[str, Take]) -> None:
        for name, take in takes.items():
            take(self._named[name].clone())
