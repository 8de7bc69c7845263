"""How a parameter is cut over ranks and joined again."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.model.shards import Sharding, own_heads, padded_size


def grid(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows * columns).view(rows, columns)


def test_each_fused_piece_is_cut_by_itself() -> None:
    rule, whole = Sharding(0, (4, 2)), grid(6, 1)
    shards = [rule.take(whole, rank, 2) for rank in range(2)]
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 4], [2, 3, 5]]
    assert torch.equal(rule.join(shards), whole) and rule.whole_shape((3, 1)) == (6, 1)


def test_columns_are_cut_as_rows_are() -> None:
    rule, whole = Sharding(1, (6,)), grid(2, 6)
    shards = [rule.take(whole, rank, 3) for rank in range(3)]
    assert shards[1].tolist() == [[2, 3], [8, 9]] and torch.equal(rule.join(shards), whole)


def test_padded_rows_are_zeros_that_go_again() -> None:
    rule, whole = Sharding(0, (5,), padded=True), grid(5, 2) + 1
    shards = [rule.take(whole, rank, 2) for rank in range(2)]
    assert [len(shard) for shard in shards] == [3, 3] and not shards[1][-1].any()
    assert torch.equal(rule.join(shards), whole)
    assert [padded_size(size, 4) for size in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_replicas_must_be_equal() -> None:
    rule, whole = Sharding(), grid(2, 2)
    assert rule.take(whole, 1, 2) is whole and rule.join([whole, whole.clone()]) is whole
    assert rule.whole_shape((2, 2)) == (2, 2)
    with pytest.raises(ValueError, match="different values of a replicated parameter"):
        rule.join([whole, whole + 1])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[5, 1\] is not 6 long in dimension 0"):
        Sharding(0, (6,)).take(grid(5, 1), 0, 2)
    with pytest.raises(ValueError, match=r"pieces of \[4, 3\] cannot be cut evenly over 2 ranks"):
        Sharding(0, (4, 3)).take(grid(7, 1), 0, 2)
    with pytest.raises(ValueError, match=r"shards are \[3, 2\] long in dimension 0, expected 3 each"):
        Sharding(0, (6,)).join([grid(3, 1), grid(2, 1)])


def test_outputs_are_gathered_where_all_read_them_or_heads_are_shared() -> None:
    assert Sharding(0, (8,)).exchanged(2) == 0
    assert Sharding(0, (8, 4), gathered=True).exchanged(2) == 12
    shared = Sharding(0, (8,), heads=(2, 4))
    assert [shared.exchanged(size) for size in (1, 2, 4)] == [0, 0, 8]


def test_heads_of_a_rank() -> None:
    assert [list(own_heads(4, rank, 2)) for rank in range(2)] == [[0, 1], [2, 3]]
    assert [list(own_heads(2, rank, 4)) for rank in range(4)] == [[0], [0], [1], [1]]
