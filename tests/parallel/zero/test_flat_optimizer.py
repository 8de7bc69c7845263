"""The flat optimizer against the single-process one in fp64, with parameters cut and sharded by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sleeptrain.config.schema import OptimConfig
from sleeptrain.errors import ConfigError
from sleeptrain.optim import muon
from sleeptrain.optim.optimizers import Optimizers, ParameterRole
from sleeptrain.parallel.zero.flat_optimizer import FlatOptimizer, ModelStage, Partition
from sleeptrain.parallel.zero.matrix_exchange import Fragment, Unsharded
from tests.parallel.processes import run_ranks

INTERLEAVED = torch.arange(12).view(3, 2, 2)
# The order of the names is not the sorted one, and no cut falls on a border of matrices or rows.
SHAPES = {"qkv": (12, 6), "gated": (12, 7), "embedding": (12, 5), "out": (6, 8), "again": (12, 6), "bias": (8,)}
ROLES = {
    "qkv": ParameterRole("muon", blocks=(slice(0, 4), slice(4, 6), slice(6, 12))),
    "gated": ParameterRole("muon", blocks=(INTERLEAVED[:, 0].flatten(), INTERLEAVED[:, 1].flatten())),
    "embedding": ParameterRole("adamw"),
    "out": ParameterRole("muon"),
    "again": ParameterRole("muon"),
    "bias": ParameterRole("adamw", decay=False),
}
NUM_MATRICES = 3 + 2 + 1 + 1
CONFIG = OptimConfig(muon_lr=0.1, adamw_lr=0.05, muon_weight_decay=0.2, adamw_weight_decay=0.3)
RATES = (1.0, 0.5, 0.25)
PADDING = 3


class ByBlock:
    """Shards that hold an equal part of the rows of each block, as a fused projection is cut by heads."""

    def __init__(self, size: int):
        self._size = size

    def _rows(self, name: str, total: int, rank: int) -> torch.Tensor:
        blocks = ROLES[name].blocks or (slice(None),)
        at = torch.arange(total)
        return torch.cat([at[rows].flatten().chunk(self._size)[rank] for rows in blocks]).sort().values

    def take(self, name: str, full: torch.Tensor, rank: int) -> torch.Tensor:
        return full[self._rows(name, full.shape[0], rank)]

    def join(self, name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        assert len(shards) == self._size
        total = sum(s.shape[0] for s in shards)
        full = shards[0].new_empty(total, *shards[0].shape[1:])
        for rank, shard in enumerate(shards):
            full[self._rows(name, total, rank)] = shard
        return full


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()}


def single_process(scaling: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    parameters = {n: torch.nn.Parameter(t) for n, t in random_tensors(0).items()}
    optim = Optimizers(ROLES, parameters, OptimConfig(**{**vars(CONFIG), "muon_scaling": scaling}))
    for step, rate in enumerate(RATES):
        for n, gradient in random_tensors(100 + step).items():
            parameters[n].grad = gradient
        optim.step(rate)
    return {n: p.detach() for n, p in parameters.items()}, optim.state_dict()


def flattened(group: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([*(tensors[n].reshape(-1) for n in group), torch.zeros(PADDING, dtype=torch.float64)])


def cut(
    group: Sequence[str], local: Mapping[str, torch.Tensor], rank: int, size: int
) -> tuple[slice, tuple[Fragment, ...]]:
    """This data rank's part of the concatenated group; the first rank has the smallest part."""
    total = flattened(group, local).numel()
    borders = [total * r * (r + 1) // (size * (size + 1)) for r in range(size + 1)]
    begin, end = borders[rank], borders[rank + 1]
    fragments, at = [], 0
    for name in group:
        first, last = max(at, begin), min(at + local[name].numel(), end)
        if first < last:
            fragments.append(Fragment(name, first - at, last - first, first - begin))
        at += local[name].numel()
    return slice(begin, end), tuple(fragments)


def partitioned(tensor_size: int, scaling: str, damage: bool = False) -> dict[str, Any]:
    """Take three steps on this rank's partitions; return its weights, momentum and amount of work."""
    shard, rank = dist.get_rank() % tensor_size, dist.get_rank() // tensor_size
    shards, data_size = ByBlock(tensor_size), dist.get_world_size() // tensor_size
    counted: list[int] = []
    plain = muon.newton_schulz
    muon.newton_schulz = lambda G: counted.append(G.shape[0]) or plain(G)  # type: ignore[func-returns-value]

    def local(seed: int) -> dict[str, torch.Tensor]:
        return {n: shards.take(n, t, shard) if tensor_size > 1 else t for n, t in random_tensors(seed).items()}

    parameters = {n: torch.nn.Parameter(t) for n, t in local(0).items()}
    config = OptimConfig(**{**vars(CONFIG), "muon_scaling": scaling})
    optimizer = FlatOptimizer(ROLES, parameters, config)
    groups = [group["names"] for group in optimizer.param_groups]
    partitions, spans = [], []
    for names_of_group, group in zip(groups, optimizer.param_groups, strict=True):
        span, fragments = cut(names_of_group, local(0), rank, data_size)
        flat = torch.nn.Parameter(flattened(names_of_group, local(0))[span].clone())
        if damage and rank == 0 and fragments:
            fragments = fragments[1:]
        group["params"] = [flat]
        spans.append(span)
        partitions.append(Partition(group["kind"], group["names"], (flat,), fragments))
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    optimizer.bind(partitions, ModelStage(None, shard, shapes, SHAPES, shards if tensor_size > 1 else Unsharded()))
    for step, rate in enumerate(RATES):
        for names_of_group, span, partition in zip(groups, spans, partitions, strict=True):
            partition.tensors[0].grad = flattened(names_of_group, local(100 + step))[span]
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        optimizer.step()
    result: dict[str, Any] = {"shard": shard, "fragments": [], "matrices": sum(counted), "state": 0}
    for partition in partitions:
        (flat,) = partition.tensors
        state = optimizer.state[flat]
        result["state"] += sum(t.numel() for t in state.values() if t.dim())
        kept = state["momentum_buffer" if partition.kind == "muon" else "exp_avg_sq"]
        for f in partition.fragments:
            at = slice(f.offset, f.offset + f.numel)
            result["fragments"].append((f.name, f.start, flat.detach()[at].clone(), kept[at].clone(), shapes[f.name]))
    return result


def joined(results: Sequence[dict[str, Any]], tensor_size: int, which: int) -> dict[str, torch.Tensor]:
    """Full tensors from the fragments of all ranks: weights (2) or optimizer state (3)."""
    local: dict[tuple[str, int], torch.Tensor] = {}
    for result in results:
        for fragment in result["fragments"]:
            name, start, shape = fragment[0], fragment[1], fragment[4]
            full = local.setdefault((name, result["shard"]), torch.full(shape, torch.nan, dtype=torch.float64))
            full.view(-1)[start : start + fragment[which].numel()] = fragment[which]
    shards = ByBlock(tensor_size)
    return {n: shards.join(n, [local[n, s] for s in range(tensor_size)]) for n in SHAPES}


@pytest.mark.parametrize(
    ("world", "tensor_size", "scaling"),
    [(1, 1, "moonshot"), (2, 1, "keller_jordan"), (3, 1, "moonshot"), (2, 2, "keller_jordan"), (4, 2, "moonshot")],
)
def test_equals_the_single_process_in_fp64(world: int, tensor_size: int, scaling: str) -> None:
    weights, state = single_process(scaling)
    results = run_ranks(partitioned, world, tensor_size, scaling)
    found, kept = joined(results, tensor_size, 2), joined(results, tensor_size, 3)
    for name, role in ROLES.items():
        torch.testing.assert_close(found[name], weights[name], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        wanted = state[role.kind][name]["momentum_buffer" if role.kind == "muon" else "exp_avg_sq"]
        torch.testing.assert_close(kept[name], wanted, rtol=0, atol=1e-14)
    assert sum(r["matrices"] for r in results) == NUM_MATRICES * len(RATES)
    if world <= 3:
        assert all(r["matrices"] for r in results)


def test_the_state_is_cut_as_the_weights_are() -> None:
    results = run_ranks(partitioned, 3, 1, "moonshot")
    per_element = {"muon": 1, "adamw": 2}
    weights = sum(torch.Size(s).numel() * per_element[ROLES[n].kind] for n, s in SHAPES.items())
    padding = PADDING * (1 + 2)
    assert sum(r["state"] for r in results) == weights + padding
    assert max(r["state"] for r in results) < 0.6 * weights


def test_a_layout_with_a_gap_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"do not cover its .* elements exactly once"):
        run_ranks(partitioned, 2, 1, "moonshot", True)


def test_every_stage_has_the_groups_of_all() -> None:
    """DeepSpeed adds norms up over stages group by group: with a group missing, a stage waits for ever."""
    parameters = {n: torch.nn.Parameter(t) for n, t in random_tensors(0).items()}
    matrix = next(n for n, role in ROLES.items() if role.kind == "muon")
    for names in (list(ROLES), [matrix, "bias"]):
        groups = FlatOptimizer(ROLES, {n: parameters[n] for n in names}, CONFIG).param_groups
        assert [group["kind"] for group in groups] == ["muon", "adamw"]


def test_unknown_scaling_is_refused() -> None:
    parameters = {"out": torch.nn.Parameter(torch.zeros(2, 2))}
    with pytest.raises(ConfigError, match=r"optim\.muon_scaling"):
        FlatOptimizer(ROLES, parameters, OptimConfig(muon_scaling="kimi"))
