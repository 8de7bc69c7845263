"""The part of a model that a process holds: by its place in the pipeline, and by its tensor ranks."""

from __future__ import annotations

from typing import Any

import pytest

from sleeptrain.distributed.mesh import Axis, Mesh
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.parallel.build import build_model
from sleeptrain.parallel.tensor import layers as tensor_layers
from tests.models import tiny_config

FOUR = ["gated_deltanet", "attention", "mamba2", "gated_deltanet"]


def names(model: Hybrid) -> set[str]:
    """The names of the parameters; of a block's parameters, the name of the block."""
    full = [name for name, _ in model.named_parameters()]
    return {".".join(name.split(".")[:2]) if name.startswith("blocks") else name for name in full}


def test_one_process_holds_all() -> None:
    config = tiny_config(FOUR, tie_embeddings=False)
    model = build_model(config, Mesh.single())
    assert type(model) is Hybrid and model.config is config
    assert names(model) == {"embedding.weight", "norm.weight", "head.weight", *(f"blocks.{n}" for n in range(4))}


@pytest.mark.parametrize(
    ("layers", "ends"),
    [(range(2), {"embedding.weight"}), (range(1, 3), set()), (range(2, 4), {"norm.weight", "head.weight"})],
)
def test_a_stage_holds_its_blocks_under_their_names_and_the_ends_that_touch_them(layers: range, ends: set[str]) -> None:
    model = build_model(tiny_config(FOUR, tie_embeddings=False), Mesh.single(), layers)
    assert names(model) == {f"blocks.{n}" for n in layers} | ends


def test_several_tensor_ranks_hold_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tensor_layers, "TensorParallelHybrid", lambda *arguments: calls.append(arguments))
    config, axis = tiny_config(FOUR), Axis(2, 1)
    build_model(config, Mesh(axis, Axis(), Axis()), range(1, 3), sequence=True)
    assert calls == [(config, axis, range(1, 3), True)]
