"""The part of a model that a process holds: by its place in the pipeline, and by its tensor ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sleeptrain.config.schema import ModelConfig
from sleeptrain.distributed.mesh import Axis, Mesh
from sleeptrain.errors import ConfigError, RefusedByAllError
from sleeptrain.model import hybrid
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.model.undrawn import undrawn
from sleeptrain.parallel.build import build_model, check_start_memory, draw_weights
from sleeptrain.parallel.tensor import layers as tensor_layers
from tests.models import tiny_config
from tests.parallel.processes import run_ranks

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
    build_model(config, Mesh(axis, Axis(3, 1), Axis()), range(1, 3), split_head=True)
    assert calls == [(config, axis, range(1, 3), True, None), (config, axis, range(1, 3), False, VocabularyPart(1, 3))]


def _drawn(names: list[str]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The parameters that this replica draws, and all its first weights."""
    drawn: list[str] = []
    initial_weight = hybrid.initial_weight

    def noted(config: ModelConfig, name: str, *arguments: Any) -> torch.Tensor | None:
        drawn.append(name)
        return initial_weight(config, name, *arguments)

    hybrid.initial_weight = noted  # this process is a fork
    with undrawn(torch.device("cpu")):
        model = build_model(tiny_config(FOUR), Mesh.single())
    draw_weights(model, 5, Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD))
    assert set(drawn) <= set(names)
    return drawn, model.state_dict()


def test_replicas_share_the_draws() -> None:
    one = Hybrid(tiny_config(FOUR))
    one.init_weights(5)
    sizes = {name: p.numel() for name, p in one.named_parameters()}
    replicas = run_ranks(_drawn, 3, list(sizes))
    drawn = [name for names, _ in replicas for name in names]
    assert sorted(drawn) == sorted(sizes), "each parameter is drawn once"
    assert max(sum(sizes[n] for n in names) for names, _ in replicas) < 0.5 * sum(sizes.values())
    for _, weights in replicas:
        for name, weight in one.state_dict().items():
            assert torch.equal(weights[name], weight), name


def test_a_start_that_cannot_hold_its_whole_shard_is_refused() -> None:
    with torch.device("meta"):
        model = Hybrid(tiny_config(FOUR))
    num_bytes = 4 * sum(p.numel() for p in model.parameters())
    check_start_memory(model, 2, num_bytes // 2, is_main=True)
    with pytest.raises(ConfigError, match=r"parallel\.zero=3 cuts weights .* Raise parallel\.tensor"):
        check_start_memory(model, 1, num_bytes // 2, is_main=True)
    with pytest.raises(RefusedByAllError):
        check_start_memory(model, 1, num_bytes // 2, is_main=False)
