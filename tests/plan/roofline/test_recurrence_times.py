"""The times of recurrences beside published ones."""

from __future__ import annotations

import pytest

from sleeptrain.plan.roofline.recurrence_times import (
    DELTA_RULE,
    DELTA_RULE_BACKWARD,
    LINEAR_ATTENTION,
    RecurrenceTime,
)

# ms by (heads, rows, tokens of a row), FlashQLA's benchmark_results_H200.txt.
FORWARD = {
    (8, 1, 2048): 0.081, (8, 1, 8192): 0.234, (8, 2, 4096): 0.162, (8, 1, 32768): 0.902,
    (16, 1, 2048): 0.102, (16, 1, 4096): 0.175, (16, 1, 8192): 0.334, (16, 2, 4096): 0.259, (16, 1, 32768): 1.275,
    (32, 1, 2048): 0.140, (32, 1, 8192): 0.500, (32, 2, 4096): 0.504, (32, 1, 32768): 1.939,
    (64, 1, 2048): 0.220, (64, 1, 8192): 0.814, (64, 1, 32768): 3.331,
}  # fmt: skip
BACKWARD = {
    (4, 1, 8192): 0.606, (8, 1, 8192): 0.722, (16, 1, 8192): 0.957, (32, 1, 8192): 1.444,
    (4, 1, 32768): 2.311, (8, 1, 32768): 2.743, (16, 1, 32768): 3.701, (32, 1, 32768): 5.697,
}  # fmt: skip


def ratio(times: RecurrenceTime, heads: int, rows: int, tokens: int, published: float) -> float:
    return times.seconds(rows, -(-tokens // 64), rows * tokens, heads) * 1e3 / published


@pytest.mark.parametrize(("times", "published"), [(DELTA_RULE, FORWARD), (DELTA_RULE_BACKWARD, BACKWARD)])
def test_no_time_is_shorter_than_its_published_one(
    times: RecurrenceTime, published: dict[tuple[int, int, int], float]
) -> None:
    ratios = {case: ratio(times, *case, ms) for case, ms in published.items()}
    assert all(0.99 < r < 1.23 for r in ratios.values()), ratios
    assert 0.99 < ratio(DELTA_RULE, 16, 1, 2048, 0.102) < 1.01, "the shape of the 2B"


def test_a_short_row_needs_its_launches_at_least() -> None:
    one = DELTA_RULE.seconds(1, 1, 1, 16)
    assert 9 * 2.5e-6 < one < 1.1 * 9 * 2.5e-6
    assert LINEAR_ATTENTION.seconds(1, 1, 1, 16) < one / 2


def test_the_width_of_heads_leaves_launches_alone() -> None:
    narrow, wide = (DELTA_RULE.seconds(1, 32, 2048, 16, state) for state in (64 * 64, 256 * 256))
    launches = 9 * 2.5e-6
    assert narrow > launches and wide - launches == pytest.approx(4**1.4 * (narrow - launches))
