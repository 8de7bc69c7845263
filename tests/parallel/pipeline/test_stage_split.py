"""The split of the layers into stages, by the cost of each layer over all passes."""

from __future__ import annotations

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.stage_split import balanced_bounds, layer_costs, schedule_costs, split_stages


def four_layers(*more: str) -> Config:
    layers = "model.layers=[gated_deltanet,gated_deltanet,gated_deltanet,gated_deltanet]"
    return compose(["experiment=rule110", "sleep.curriculum=[]", "model.vocab_size=17", layers, *more])


@pytest.mark.parametrize(
    ("costs", "stages", "bounds"),
    [
        ([1, 1, 1, 1], 2, (0, 2, 4)),
        ([5, 1, 1, 1], 2, (0, 1, 4)),
        ([1, 1, 1, 5], 2, (0, 3, 4)),
        ([1, 2, 3, 4, 5], 3, (0, 3, 4, 5)),
        ([1, 2, 3], 1, (0, 3)),
        ([9, 1, 1], 3, (0, 1, 2, 3)),
    ],
)
def test_the_most_expensive_stage_is_as_cheap_as_can_be(
    costs: list[float], stages: int, bounds: tuple[int, ...]
) -> None:
    assert balanced_bounds(costs, stages) == bounds


def test_the_core_costs_each_pass_and_the_coda_at_most_two() -> None:
    def times(*more: str) -> list[float]:
        costs = layer_costs(four_layers(*more))
        return [cost / costs[0] for cost in costs]

    assert times("sleep.core=[1,3]", "sleep.passes=3") == pytest.approx([1, 3, 3, 2])
    assert times("sleep.core=[1,3]", "sleep.passes=1") == pytest.approx([1, 1, 1, 1])


def test_stages_suit_the_most_passes_of_the_curriculum() -> None:
    once = layer_costs(four_layers("sleep.passes=1"))
    later = four_layers("sleep.passes=1", "sleep.curriculum=[{tokens: 100, passes: 5}]")
    assert layer_costs(later) == pytest.approx([5 * cost for cost in once])


def test_the_head_weighs_on_the_last_stage() -> None:
    even = four_layers("sleep.passes=1", "model.dim=16", "model.ffn_dim=16")
    assert split_stages(even, 2).bounds == (0, 2, 4)
    wide = four_layers("sleep.passes=1", "model.dim=16", "model.ffn_dim=16", "model.vocab_size=1000000")
    assert split_stages(wide, 2).bounds == (0, 3, 4)
    assert schedule_costs(wide).head > 100 * schedule_costs(even).head > 0


def test_stages_know_the_core_and_whether_eviction_slides() -> None:
    plain = split_stages(four_layers(), 2)
    assert (plain.core, plain.sliding, plain.layers) == ((0, 4), False, ("gated_deltanet",) * 4)
    other = split_stages(four_layers("sleep.core=[1,3]", "sleep.eviction=sliding"), 2)
    assert (other.core, other.sliding) == ((1, 3), True)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.pipeline=5 is more than the 4 blocks"):
        split_stages(four_layers(), 5)
