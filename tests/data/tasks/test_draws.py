from __future__ import annotations

import itertools
from collections import Counter

import pytest

from sleeptrain.data.tasks.draws import Draws


def counts(values: list[object]) -> list[int]:
    return sorted(Counter(values).values())


def test_draws_depend_on_seed_stream_and_number() -> None:
    first = [Draws(3, 1, 7).below(1000) for _ in range(2)]
    assert first[0] == first[1]
    many = [
        tuple(Draws(*key).below(10**9) for _ in range(1)) for key in itertools.product(range(3), range(3), range(9))
    ]
    assert len(set(many)) == 81
    long = Draws(0, 0, 0)
    values = [long.below(2**62) for _ in range(1000)]
    assert len(set(values)) == 1000, "a row's stream does not repeat where it fetches words again"
    assert not set(values) & {Draws(0, 0, n).below(2**62) for n in range(1, 500)}


@pytest.mark.parametrize("bound", [1, 2, 7])
def test_draws_are_uniform(bound: int) -> None:
    draws = Draws(0, 0, 0)
    values = counts([draws.below(bound) for _ in range(7000)])
    assert len(values) == bound and values[0] > 0.9 * 7000 / bound


def test_all_orders_are_equally_likely() -> None:
    draws = Draws(1, 0, 0)
    orders = counts([tuple(draws.shuffled("abc")) for _ in range(6000)])
    assert len(orders) == 6 and orders[0] > 850
    assert sorted(draws.shuffled(range(50))) == list(range(50))


def test_weights_are_shares() -> None:
    draws = Draws(2, 0, 0)
    values = Counter(draws.weighted([1.0, 0.0, 3.0]) for _ in range(4000))
    assert set(values) == {0, 2} and values[2] / 4000 == pytest.approx(0.75, abs=0.03)
    assert {draws.between(3, 5) for _ in range(100)} == {3, 4, 5}
