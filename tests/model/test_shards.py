"""How a parameter is cut over ranks and joined again."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.model.shards import Sharding, own_heads, padded_size


def grid(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows * columns).view(rows, columns)


def test_each_fused_piece_is_cut_by_itself() -> None:
    rule, full = Sharding(0, (4, 2)), grid(6, 1)
    shards = [rule.take(full, rank, 2) for rank in range(2)]
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 4], [2, 3, 5]]
    assert torch.equal(rule.join(shards), full) and rule.whole_shape((3, 1)) == (6, 1)


def test_columns_are_cut_as_rows_are() -> None:
    rule, full = Sharding(1, (6,)), grid(2, 6)
    shards = [rule.take(full, rank, 3) for rank in range(3)]
    assert shards[1].tolist() == [[2, 3], [8, 9]] and torch.equal(rule.join(shards), full)


def test_padded_rows_are_zeros_and_are_removed() -> None:
    rule, full = Sharding(0, (5,), padded=True), grid(5, 2) + 1
    shards = [rule.take(full, rank, 2) for rank in range(2)]
    assert [len(shard) for shard in shards] == [3, 3] and not shards[1][-1].any()
    assert torch.equal(rule.join(shards), full)
    assert [padded_size(size, 4) for size in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_replicas_must_be_equal() -> None:
    rule, full = Sharding(), grid(2, 2)
    assert rule.take(full, 1, 2) is full and rule.join([full, full.clone()]) is full
    assert rule.whole_shape((2, 2)) == (2, 2)
    with pytest.raises(ValueError, match="different values of a replicated parameter"):
        rule.join([full, full + 1])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[5, 1\] is not 6 long in dimension 0"):
        Sharding(0, (6,)).take(grid(5, 1), 0, 2)
    with pytest.raises(ValueError, match=r"pieces of \[4, 3\] cannot be cut evenly over 2 ranks"):
        Sharding(0, (4, 3)).take(grid(7, 1), 0, 2)
    with pytest.raises(ValueError, match=r"shards are \[3, 2\] long in dimension 0, expected 3 each"):
        Sharding(0, (6,)).join([grid(3, 1), grid(2, 1)])


def test_outputs_are_gathered_where_all_ranks_read_them_or_share_heads() -> None:
    assert Sharding(0, (8,)).exchanged(2) == 0
    assert Sharding(0, (8, 4), gathered=True).exchanged(2) == 12
    shared = Sharding(0, (8,), heads=(2, 4))
    assert [shared.exchanged(size) for size in (1, 2, 4)] == [0, 0, 8]


def test_heads_of_a_rank() -> None:
    assert [list(own_heads(4, rank, 2)) for rank in range(2)] == [[0, 1], [2, 3]]
    assert [list(own_heads(2, rank, 4)) for rank in range(4)] == [[0], [0], [1], [1]]
