from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeptrain.data.mixture import NEVER, Quota, shares
from sleeptrain.errors import ConfigError

SHARES = [Fraction(0), Fraction(1), Fraction(1, 3), Fraction(7, 10), Fraction(1, 97), Fraction(999_999, 10**6)]


def test_shares_are_the_exact_decimals() -> None:
    assert shares({"a": 0.7, "b": 0.3}) == {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    assert shares({"a": 0.1, "b": 0.2, "c": 0}) == {"a": Fraction(1, 3), "b": Fraction(2, 3), "c": Fraction(0)}
    assert shares({"a": 1e-5, "b": 1}) == {"a": Fraction(1, 100_001), "b": Fraction(100_000, 100_001)}
    assert sum(shares({"a": 0.1, "b": 0.7, "c": 12.25}).values()) == 1


@pytest.mark.parametrize("weights", [{"a": 0.0}, {"a": 1.0, "b": -0.1}, {"a": 0.5, "b": -0.5}])
def test_impossible_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"data\.shards.*must not be negative, and one must be above 0"):
        shares(weights)


def test_weights_that_are_too_fine_are_refused() -> None:
    with pytest.raises(ConfigError, match="too fine"):
        shares({"a": 0.1234567, "b": 1})
    shares({"a": 999_999, "b": 1})


@st.composite
def quotas(draw: st.DrawFn) -> tuple[list[int], list[Fraction], int]:
    starts = [0, *sorted(draw(st.lists(st.integers(0, 150), max_size=3)))]
    return starts, [draw(st.sampled_from(SHARES)) for _ in starts], draw(st.integers(0, 60))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(quotas())
def test_owed_and_due_equal_a_count_by_ticks(quota: tuple[list[int], list[Fraction], int]) -> None:
    """Adds fractions tick by tick, and rounds down at each tick and at the end of each stage."""
    starts, parts, lead = quota
    made = Quota(starts, parts, lead)
    owed, before, gained, stage = [], 0, Fraction(0), 0
    for tick in range(400):
        now = max(i for i, start in enumerate(starts) if start <= tick)
        if now != stage:
            before, gained, stage = before + int(gained), Fraction(0), now
        owed.append(max(0, before + int(gained) - lead))
        gained += parts[now]
    assert [made.owed(tick) for tick in range(400)] == owed
    assert all(0 <= after - amount <= 1 for amount, after in pairwise(owed))
    due = made.due(np.arange(owed[-1] + 50)).tolist()
    for position, time in enumerate(due[: owed[-1]]):
        assert time == max(tick for tick in range(400) if owed[tick] <= position)
    if parts[-1] == 0:
        assert set(due[owed[-1] :]) == {NEVER}
    else:
        assert all(made.owed(time) <= position < made.owed(time + 1) for position, time in enumerate(due))


def test_large_numbers_stay_exact() -> None:
    share = Fraction(333_333, 999_999)
    made = Quota([0, 10**12], [share, 1 - share], 5)
    assert made.owed(10**12) == 10**12 * 333_333 // 999_999 - 5
    time = int(made.due(np.array([10**11]))[0])
    assert made.owed(time) <= 10**11 < made.owed(time + 1)
    assert made.owed(2 * 10**12) == made.owed(10**12) + 10**12 * 666_666 // 999_999
