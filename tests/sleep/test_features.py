"""Features of rows, gathered from the rounds that left them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from sleeptrain.sleep.features import Features, gather_rows, select
from sleeptrain.sleep.inputs import RoundInputs


def part(*rows: int) -> tuple[tuple[int, ...], torch.Tensor]:
    """Features [R, 1, 1] whose values are the rows."""
    return rows, torch.tensor(rows, dtype=torch.float32)[:, None, None]


def inputs(rows: tuple[int, ...] = (), index: list[int] | None = None) -> RoundInputs:
    at = None if index is None else torch.tensor(index)
    return cast(RoundInputs, SimpleNamespace(tokens_RL=torch.zeros(1, 1), source_rows=rows, source_index_R=at))


def test_the_features_of_the_same_rows_are_the_same_tensor() -> None:
    rows, features = part(0, 2)
    assert gather_rows([(rows, features)], rows, inputs()) is features


@pytest.mark.parametrize("known", [True, False])
def test_rows_come_from_several_rounds(known: bool) -> None:
    """The index is the one of the inputs if it is about these rows, else it is made."""
    given = inputs((3, 0, 1), [2, 0]) if known else inputs()
    found = gather_rows([part(3), part(0, 1)], (1, 3), given)
    assert found.flatten().tolist() == [1, 3]


def test_rounds_that_leave_one_kind_of_features_are_left_out_of_the_other() -> None:
    (rows, first), (_, second) = part(0, 1), part(0, 1)
    found = select([Features(rows, first, None), Features(rows, None, second)], rows, inputs(rows))
    assert found.core_input_RLD is first and found.output_RLD is second and found.rows == rows


def test_a_pass_over_the_tail_of_a_window_reads_the_last_features() -> None:
    longer = torch.arange(6.0).view(2, 3, 1)
    found = gather_rows([((0, 1), longer)], (0, 1), inputs())
    assert found.flatten().tolist() == [2, 5]
