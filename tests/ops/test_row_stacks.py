"""Rows of products that wait: sums are those of single products, whatever waits where."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.ops import row_stacks
from sleeptrain.ops.add_product import add_product, add_products
from sleeptrain.ops.row_stacks import RecordedRows, RowStacks, fixed_place, stacking_rows

FP64 = torch.float64


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_stacks, "LARGE", 35)
    monkeypatch.setattr(row_stacks, "STACKED", 40)
    monkeypatch.setattr(row_stacks, "FEW", 17)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=FP64)


def factors(rows: int, *columns: int) -> list[torch.Tensor]:
    """dy [rows, columns] of each total; the last one is x."""
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, n, dtype=FP64, generator=generator) for n in columns]


def test_rows_are_kept_and_multiplied_together() -> None:
    """Few rows are added when there are many, many at once, and the rest at the end."""
    total, small, expected, seen = ones(5, 7), ones(2, 3), ones(5, 7), []
    with stacking_rows([total, small]):
        for rows in (16, 15, 14, 2, 13, 17):
            dy, x = factors(rows, 5, 7)
            expected += dy.t() @ x
            add_product(total, dy.t(), x, FP64)
            dy.zero_(), x.zero_()  # compiled code reuses their memory
            seen.append(torch.allclose(total, expected))
        dy, x = factors(4, 2, 3)
        add_product(small, dy.t(), x, FP64)
        torch.testing.assert_close(small, 1 + dy.t() @ x)
    assert seen == [False] * 6 and not row_stacks._owners
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


def test_totals_that_share_rows_have_one_stack() -> None:
    """The rows that several products share are kept once, also those of a small total among them."""
    large, small, wide, stacks = ones(5, 7), ones(2, 7), ones(6, 7), RowStacks()
    a, b, c, x = factors(8, 5, 2, 6, 7)
    with stacking_rows([large, small, wide], stacks):
        add_products([large, small, wide], [a.t(), b.t(), c.t()], x)
        assert torch.equal(large, ones(5, 7)) and torch.equal(small, ones(2, 7)) and torch.equal(wide, ones(6, 7))
    torch.testing.assert_close(large, 1 + a.t() @ x)
    torch.testing.assert_close(small, 1 + b.t() @ x)
    torch.testing.assert_close(wide, 1 + c.t() @ x)
    [stack] = stacks._stacks.values()
    assert [t.shape for t in stack._rows] == [(40, 5), (40, 2), (40, 6), (40, 7)]


def test_after_an_error_no_rows_are_left() -> None:
    total, stacks = ones(5, 7), RowStacks()
    dy, x = factors(8, 5, 7)
    with pytest.raises(ZeroDivisionError), stacking_rows([total], stacks):
        add_product(total, dy.t(), x, FP64)
        raise ZeroDivisionError
    with stacking_rows([total], stacks):
        pass
    assert not row_stacks._owners and torch.equal(total, ones(5, 7))


class Recorded:
    """A product of rows that a graph reads at their place. A replay runs the copy alone; `take` counts outside."""

    def __init__(self, total: torch.Tensor, rows: int, first: int | None) -> None:
        self.factors, self.rows, self._total = factors(rows, 5, 7), RecordedRows(first), total
        self.factors[0].zero_()
        self.launch()

    def launch(self) -> None:
        dy, x = self.factors
        with self.rows.recording():
            add_product(self._total, dy.t(), x, FP64)

    def replay(self, dy: torch.Tensor, x: torch.Tensor) -> None:
        for place, value in zip(self.factors, (dy, x), strict=True):
            place.copy_(value)
        self.rows.take()
        self.launch()


# Passes in the order of their backwards: (rows, first row of a recorded one). "now": recorded, but added at once;
# None: not recorded.
PLAYS = {
    "the passes of a window": [(8, 16), (8, 8), (8, 0)],
    "the same pass again": [(8, 8), (8, 8)],
    "the passes of two windows": [(8, 8), (8, 0), (10, 10), (10, 0)],
    "passes that overlap": [(10, 10), (8, 8), (8, 24)],
    "others between": [(8, 8), (12, None), (8, 0), (16, None), (16, None), (8, 8)],
    "one that is added at once": [(8, 8), (8, "now"), (8, 0)],
}


@pytest.mark.parametrize("play", PLAYS)
def test_recorded_products_copy_rows_to_a_fixed_place(play: str) -> None:
    total, expected, stacks = ones(5, 7), ones(5, 7), RowStacks()
    with stacking_rows([total], stacks):
        made = {key: Recorded(total, key[0], None if key[1] == "now" else key[1]) for key in PLAYS[play] if key[1]}
        made |= {(rows, 0): Recorded(total, rows, 0) for rows, first in PLAYS[play] if first == 0}
    for step in range(2):
        with stacking_rows([total], stacks):
            for number, (rows, first) in enumerate(PLAYS[play]):
                dy, x = (t * (1 + number + 10 * step) for t in factors(rows, 5, 7))
                expected += dy.t() @ x
                if first is None:
                    add_product(total, dy.t(), x, FP64)
                else:
                    made[rows, first].replay(dy, x)
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_the_passes_of_a_window_are_multiplied_together() -> None:
    total, stacks = ones(5, 7), RowStacks()
    with stacking_rows([total], stacks):
        passes = [Recorded(total, 8, fixed_place(8, number)) for number in range(3)]
        for recorded in reversed(passes):
            recorded.replay(*factors(8, 5, 7))
        [stack] = stacks._stacks.values()
        assert (stack.start, stack.stop) == (0, 24) and torch.equal(total, ones(5, 7))


def test_a_recorded_function_that_uses_a_total_twice_adds_the_second_product_at_once() -> None:
    total, rows = ones(5, 7), RecordedRows(0)
    dy, x = factors(8, 5, 7)
    with stacking_rows([total]):
        rows.take()
        with rows.recording():
            add_product(total, dy.t(), x, FP64)
            add_product(total, dy.t(), x, FP64)
        rows.take()
    torch.testing.assert_close(total, 1 + 2 * dy.t() @ x)


def test_places_are_inside_the_stack() -> None:
    assert [fixed_place(16, number) for number in range(4)] == [0, 16, 0, 16]
    assert fixed_place(17, 0) is None
