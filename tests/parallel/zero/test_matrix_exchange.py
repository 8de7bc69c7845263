"""Fragments of matrices on their way to an owner and back: each element is sent once, and the owners share the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sleeptrain.parallel.zero.matrix_exchange import (
    Exchange,
    Fragment,
    Holding,
    LayoutError,
    Unsharded,
    assign_owners,
    gather_holdings,
    newton_schulz_cost,
)
from tests.parallel.threads import run_threads


@pytest.mark.parametrize(
    "spans",
    [[(0, 4)], [(0, 4), (3, 3)], [(0, 4), (5, 1)], [(1, 5)], [(0, 4), (4, 4)], []],
)
def test_fragments_that_do_not_tile_are_refused(spans: list[tuple[int, int]]) -> None:
    shapes = {"w": (2, 3)}
    holdings = [Holding(0, shapes, tuple(Fragment("w", start, numel, 0) for start, numel in spans))]
    with pytest.raises(LayoutError, match=r"w .tensor rank 0. do not cover its 6 elements"):
        Exchange(holdings, {"w": 0}, Unsharded(), 0)


def test_a_missing_tensor_shard_is_refused() -> None:
    shapes = {"w": (2, 3)}
    holdings = [Holding(0, shapes, (Fragment("w", 0, 6, 0),)), Holding(1, shapes, ())]
    with pytest.raises(LayoutError, match="tensor rank 1"):
        Exchange(holdings, {"w": 0}, Unsharded(), 0)


def test_owners_share_the_work() -> None:
    costs = {"a": 8.0, "b": 5.0, "c": 4.0, "d": 4.0, "e": 1.0}
    owners = assign_owners(costs, 2)
    loads = [sum(costs[n] for n, o in owners.items() if o == rank) for rank in range(2)]
    assert loads == [12.0, 10.0] or loads == [11.0, 11.0]
    assert assign_owners(dict(reversed(costs.items())), 2) == owners
    assert set(assign_owners({"a": 1.0}, 4).values()) == {0}


def test_one_process_works_on_whole_matrices_and_changes_nothing_else() -> None:
    holding = Holding(0, {"w": (2, 3), "v": (2,)}, (Fragment("v", 0, 2, 0), Fragment("w", 0, 6, 3)))
    exchange, seen = Exchange([holding], {"w": 0}, Unsharded(), 0), dict[str, torch.Tensor]()

    def double(matrices: dict[str, torch.Tensor]) -> None:
        seen.update({name: matrix.clone() for name, matrix in matrices.items()})
        for matrix in matrices.values():
            matrix.mul_(2)

    result = exchange(torch.arange(10.0), double)
    assert exchange.owned == list(seen) == ["w"]
    assert seen["w"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert result.tolist() == [0, 0, 0, 6, 8, 10, 12, 14, 16, 0]


def test_a_matrix_in_pieces_out_of_order_is_joined() -> None:
    holding = Holding(0, {"w": (2, 2)}, (Fragment("w", 2, 2, 0), Fragment("w", 0, 2, 2)))
    seen: list[torch.Tensor] = []
    result = Exchange([holding], {"w": 0}, Unsharded(), 0)(
        torch.tensor([3.0, 4, 1, 2]), lambda matrices: seen.append(matrices["w"].clone())
    )
    assert seen[0].tolist() == [[1, 2], [3, 4]] and result.tolist() == [3, 4, 1, 2]


def exchanged(
    monkeypatch: pytest.MonkeyPatch, holdings: list[Holding], flats: list[torch.Tensor], owner: int
) -> tuple[list[list[float]], list[int]]:
    """The results of ranks whose work adds 10, and the number of elements that each has sent to others."""

    def run(group: Any) -> tuple[list[float], int]:
        def work(matrices: dict[str, torch.Tensor]) -> None:
            assert list(matrices) == (["w"] if group.rank == owner else [])
            for matrix in matrices.values():
                matrix.add_(10)

        result = Exchange(holdings, {"w": owner}, Unsharded(), group.rank, group)(flats[group.rank], work)
        return result.tolist(), group.moved

    results, moved = zip(*run_threads(monkeypatch, len(holdings), run), strict=True)
    return list(results), list(moved)


@pytest.mark.parametrize("owner", [0, 1])
def test_two_processes_that_hold_parts_of_a_matrix_get_the_results_of_their_parts(
    monkeypatch: pytest.MonkeyPatch, owner: int
) -> None:
    shapes = {"w": (2, 3)}
    holdings = [Holding(0, shapes, (Fragment("w", 0, 2, 1),)), Holding(0, shapes, (Fragment("w", 2, 4, 0),))]
    flats = [torch.tensor([9.0, 0, 1]), torch.tensor([2.0, 3, 4, 5])]
    results, sent = exchanged(monkeypatch, holdings, flats, owner)
    assert results == [[0, 10, 11], [12, 13, 14, 15]]
    moved = 2 if owner else 4  # the part of the process that does not own it, there and back
    assert sent == [moved, moved]


def test_copies_of_a_fragment_count_as_one_and_all_get_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner uses its own copy, so nobody sends it one."""
    holdings = [Holding(0, {"w": (1, 2)}, (Fragment("w", 0, 2, 0),)) for _ in range(2)]
    results, sent = exchanged(monkeypatch, holdings, [torch.zeros(2), torch.ones(2)], owner=1)
    assert results == [[11, 11], [11, 11]]
    assert sent == [0, 2]


def test_a_square_matrix_costs_three_products_and_blocks_less() -> None:
    assert newton_schulz_cost((4, 4), None) == 4 * 4 * (2 * 4 + 4)
    assert newton_schulz_cost((4, 6), None) == newton_schulz_cost((6, 4), None) == 4 * 4 * (2 * 6 + 4)
    halves = (slice(0, 2), torch.tensor([2, 3]))
    assert newton_schulz_cost((4, 6), halves) == 2 * 2 * 2 * (2 * 6 + 2)


def test_every_process_learns_what_all_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    holdings = [Holding(shard, {"w": (2,)}, (Fragment("w", 0, 2, shard),)) for shard in range(3)]
    assert run_threads(monkeypatch, 3, lambda group: gather_holdings(holdings[group.rank], group)) == [holdings] * 3
