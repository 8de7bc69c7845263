"""Tied embeddings at both ends of a pipeline: equal gradients, and one copy in the norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from sleeptrain.distributed.mesh import Axis, Mesh
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.parallel.build import build_model
from sleeptrain.parallel.pipeline.tied import TiedEmbedding
from tests.models import tiny_config
from tests.parallel.threads import run_threads


def stage(rank: int, size: int, tied: bool = True) -> tuple[Hybrid, TiedEmbedding]:
    model = build_model(tiny_config(tie_embeddings=tied), Mesh.single(), range(rank, rank + 1))
    return model, TiedEmbedding(model, Mesh(Axis(), Axis(size, rank), Axis()))


def test_both_copies_get_the_sum_of_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: dict[int, Any] = {}
    monkeypatch.setattr(parallel_state, "get_embedding_group", lambda: groups)

    def run(group: Any) -> torch.Tensor:
        model, tied = stage(2 * group.rank, 3)
        assert model.embedding is not None
        tied._group = group  # the threads share what each process has of its own
        model.embedding.weight.grad = torch.full_like(model.embedding.weight, 1.0 + group.rank)
        tied.sum_gradients()
        return model.embedding.weight.grad

    assert all(torch.equal(grad, torch.full_like(grad, 3.0)) for grad in run_threads(monkeypatch, 2, run))


def test_the_norm_counts_the_first_copy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "get_embedding_group", lambda: None)
    for rank, omitted in ((0, False), (2, True)):
        model, _ = stage(rank, 3)
        assert model.embedding is not None
        assert model.embedding.weight.ds_pipe_replicated is omitted


@pytest.mark.parametrize(("rank", "size", "tied"), [(1, 3, True), (0, 3, False), (2, 3, False), (0, 1, True)])
def test_a_stage_without_a_second_copy_sums_nothing(
    monkeypatch: pytest.MonkeyPatch, rank: int, size: int, tied: bool
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: pytest.fail("nothing is to be summed"))
    model, embedding = stage(rank, size, tied)
    embedding.sum_gradients()
    assert not any(hasattr(p, "ds_pipe_replicated") for p in model.parameters())
