"""All-reduce of a few numbers in log2(ranks) exchanges: gloo's takes two steps for each rank, whatever the size."""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_reduce_small(sums: torch.Tensor, largest: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Replace `sums` by the sums over the ranks of a gloo group, and `largest` by the largest values, in place.

    sums [S], largest [M], both fp64; the group holds all ranks. By recursive doubling: ranks at distance 1, 2, 4, ...
    exchange what they have. Both add the same two numbers, so the results have the same bits on all ranks. Ranks above
    the largest power of two hand their numbers to a lower rank and get the results from it.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    core = 1 << (size.bit_length() - 1)
    mine = torch.cat([sums, largest])
    if rank >= core:
        dist.send(mine, rank - core, group=group)
        dist.recv(mine, rank - core, group=group)
    else:
        if rank + core < size:
            mine = _joined(mine, _received(mine, rank + core, group), len(sums))
        distance = 1
        while distance < core:
            other = torch.empty_like(mine)
            work = dist.isend(mine, rank ^ distance, group=group)
            dist.recv(other, rank ^ distance, group=group)
            assert work is not None
            work.wait()
            mine = _joined(mine, other, len(sums))
            distance *= 2
        if rank + core < size:
            dist.send(mine, rank + core, group=group)
    sums.copy_(mine[: len(sums)])
    largest.copy_(mine[len(sums) :])


def _received(like: torch.Tensor, source: int, group: dist.ProcessGroup) -> torch.Tensor:
    other = torch.empty_like(like)
    dist.recv(other, source, group=group)
    return other


def _joined(a: torch.Tensor, b: torch.Tensor, num_sums: int) -> torch.Tensor:
    return torch.cat([a[:num_sums] + b[:num_sums], torch.maximum(a[num_sums:], b[num_sums:])])
