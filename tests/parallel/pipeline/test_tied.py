"""Tied embeddings at both ends of a pipeline: equal gradients, and one copy in the norm."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sleeptrain.distributed.mesh import Axis, Mesh
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.parallel.build import build_model
from sleeptrain.parallel.pipeline.tied import TiedEmbedding
from tests.models import tiny_config
from tests.parallel.processes import run_ranks
from tests.parallel.threads import run_threads


def stage(rank: int, size: int, tied: bool = True, split_head: bool = False) -> tuple[Hybrid, TiedEmbedding]:
    mesh = Mesh(Axis(), Axis(size, rank), Axis())
    model = build_model(tiny_config(tie_embeddings=tied), mesh, range(rank, rank + 1), split_head=split_head)
    return model, TiedEmbedding(model, mesh)


def test_both_copies_get_the_sum_of_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    here = threading.local()  # the threads share what each process has of its own
    monkeypatch.setattr(parallel_state, "get_embedding_group", lambda: here.group)

    def run(group: Any) -> torch.Tensor:
        model, tied = stage(2 * group.rank, 3)
        here.group = group
        assert model.embedding is not None
        model.embedding.weight.grad = torch.full_like(model.embedding.weight, 1.0 + group.rank)
        tied.sum_gradients()
        return model.embedding.weight.grad

    assert all(torch.equal(grad, torch.full_like(grad, 3.0)) for grad in run_threads(monkeypatch, 2, run))


def test_the_copies_of_a_shared_head_get_the_sums_of_their_rows() -> None:
    def run() -> torch.Tensor:
        rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
        mesh = Mesh(Axis(), Axis(size, rank, group), Axis())
        model = build_model(tiny_config(), mesh, range(rank, rank + 1), split_head=True)
        tied = TiedEmbedding(model, mesh)
        assert model.embedding is not None
        model.embedding.weight.grad = torch.full_like(model.embedding.weight, 1.0 + rank)
        tied.sum_gradients()
        return model.embedding.weight.grad

    first, *others = run_ranks(run, 3)
    cuts = [len(first) * part // 3 for part in range(4)]
    for part, gradient in enumerate([first[: cuts[1]], *others]):
        rows = first[cuts[part] : cuts[part + 1]]
        assert torch.equal(rows, torch.full_like(rows, 1.0 if part == 0 else 2.0 + part)), f"part {part}"
        assert torch.equal(gradient[: len(rows)], rows)


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
