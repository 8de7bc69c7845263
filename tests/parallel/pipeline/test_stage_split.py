"""The split of the layers into stages, by the time of the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.schedule import schedule
from sleeptrain.parallel.pipeline.simulate import simulate
from sleeptrain.parallel.pipeline.stage_split import (
    TIE,
    SplitCosts,
    best_bounds,
    schedule_costs,
    split_costs,
    split_stages,
    split_time,
)
from sleeptrain.plan.workload import workloads


def four_layers(*more: str) -> Config:
    layers = "model.layers=[gated_deltanet,gated_deltanet,gated_deltanet,gated_deltanet]"
    return compose(["experiment=rule110", "sleep.curriculum=[]", "model.vocab_size=17", layers, *more])


def alike(layers: Sequence[float], sizes: Sequence[float] = ()) -> SplitCosts:
    """One kind of round; layers: the cost of each."""
    return SplitCosts((tuple(layers),), ((1.0,),), (True,), tuple(sizes) or (0.0,) * len(layers))


@pytest.mark.parametrize(
    ("layers", "stages", "bounds"),
    [
        ([1, 1, 1, 1], 2, (0, 2, 4)),
        ([5, 1, 1, 1], 2, (0, 1, 4)),
        ([1, 1, 1, 5], 2, (0, 3, 4)),
        ([1, 2, 3, 4, 5], 3, (0, 3, 4, 5)),
        ([1, 2, 3], 1, (0, 3)),
        ([9, 1, 1], 3, (0, 1, 2, 3)),
        ([1, 1, 1, 1, 9], 3, (0, 2, 4, 5)),  # even where another stage is the longest
    ],
)
def test_the_most_expensive_stage_is_as_cheap_as_can_be(
    layers: list[float], stages: int, bounds: tuple[int, ...]
) -> None:
    assert best_bounds(alike(layers), stages) == bounds


def test_of_equal_splits_the_one_with_the_smallest_stage_is_taken() -> None:
    embedding_first = [5.0, 1, 1, 1, 1]
    assert best_bounds(alike([1, 1, 1, 1, 9], embedding_first), 3) == (0, 1, 4, 5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_split_is_better(data: st.DataObject) -> None:
    """All splits of a few layers, over kinds of rounds with costs of their own."""
    num_layers = data.draw(st.integers(2, 7))
    num_stages = data.draw(st.integers(1, num_layers))
    layers = st.lists(st.integers(0, 5).map(float), min_size=num_layers, max_size=num_layers).map(tuple)
    kinds = tuple(data.draw(st.lists(layers, min_size=1, max_size=3)))
    weight = st.lists(st.integers(0, 4).map(float), min_size=len(kinds), max_size=len(kinds)).map(tuple)
    weights = tuple(data.draw(st.lists(weight, min_size=1, max_size=3)))
    rings = tuple(data.draw(st.booleans()) for _ in weights)
    costs = SplitCosts(kinds, weights, rings, data.draw(layers))
    inner = combinations(range(1, num_layers), num_stages - 1)
    least = min(split_time(costs, (0, *bounds, num_layers)) for bounds in inner)
    assert split_time(costs, best_bounds(costs, num_stages)) <= least * (1 + TIE) + 1e-9


def work(config: Config) -> list[float]:
    """The cost of each layer in the run, of all rounds."""
    costs = split_costs(config)
    pairs = [(w, kind) for weight in costs.weights for w, kind in zip(weight, costs.kinds, strict=True)]
    return [sum(w * kind[layer] for w, kind in pairs) for layer in range(len(costs.sizes))]


def test_the_core_costs_each_pass_and_the_coda_its_state() -> None:
    """Windows without targets run the coda in their last pass alone, of which only the state is read."""

    def times(*more: str) -> list[float]:
        costs = work(four_layers("model.dim=64", *more))
        return [cost / costs[0] for cost in costs]

    three, one = times("sleep.core=[1,3]", "sleep.passes=3"), times("sleep.core=[1,3]", "sleep.passes=1")
    assert three[1:3] == pytest.approx([3, 3], rel=0.05) and 0.1 < three[3] < 0.5
    assert one[:3] == pytest.approx([1, 1, 1])


def test_a_run_is_split_for_its_whole_curriculum() -> None:
    """The weights are the tokens of each stage; a sampled N counts as all its values."""
    later = four_layers("train.tokens=100", "sleep.passes=1", "sleep.curriculum=[{tokens: 75, passes: 5}]")
    one, five = (sum(work(four_layers("train.tokens=100", f"sleep.passes={n}"))) for n in (1, 5))
    assert sum(work(later)) == pytest.approx(0.75 * one + 0.25 * five)
    sampled = four_layers("train.tokens=100", "sleep.passes=3", "sleep.sample_passes=true")
    mean = sum(sum(work(four_layers("train.tokens=100", f"sleep.passes={n}"))) for n in (1, 2, 3)) / 3
    assert sum(work(sampled)) == pytest.approx(mean)


@pytest.mark.slow
def test_a_2b_on_four_stages_by_the_simulator() -> None:
    """The run is a tenth shorter than with stages that suit its last N, and no neighbour is shorter."""
    whole_head = "parallel.split_head=false"
    config = compose(["experiment=pretrain_2b", "parallel.pipeline=4", "sleep.recompute=none", whole_head])
    stages, costs, works = split_stages(config, 4), schedule_costs(config), workloads(config, 8)

    def simulated(bounds: tuple[int, ...]) -> tuple[float, float]:
        """(time of the run, bubble of its first stage)"""
        steps = [simulate(schedule(w.plans, replace(stages, bounds=bounds), costs), costs) for w in works]
        return sum(s.finish * w.num_steps for s, w in zip(steps, works, strict=True)), steps[0].bubble

    time, bubble = simulated(stages.bounds)
    assert bubble < 0.23
    assert time < 0.92 * simulated((0, 6, 13, 20, 24))[0]
    assert time < simulated((0, 7, 14, 21, 24))[0] and time < simulated((0, 8, 15, 22, 24))[0]


def test_a_shared_head_balances_a_2b_on_four_stages() -> None:
    """Its vocabulary of 248,320 leaves blocks even and the bubble below a fifth at N=1, where it is the largest."""
    config = compose(["experiment=pretrain_2b", "parallel.pipeline=4", "parallel.split_head=true"])
    stages, costs, works = split_stages(config, 4), schedule_costs(config), workloads(config, 8)
    assert config.model.vocab_size == 248_320 and stages.split_head
    assert stages.bounds == (0, 6, 12, 18, 24)
    assert works[0].shape.passes == 1
    assert simulate(schedule(works[0].plans, stages, costs), costs).bubble < 0.06


def test_the_head_weighs_on_the_last_stage() -> None:
    even = four_layers("sleep.passes=1", "model.dim=16", "model.ffn_dim=16")
    assert split_stages(even, 2).bounds == (0, 2, 4)
    wide = four_layers("sleep.passes=1", "model.dim=16", "model.ffn_dim=16", "model.vocab_size=60000")
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
