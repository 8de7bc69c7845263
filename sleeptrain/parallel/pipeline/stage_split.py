"""The split of the layers into pipeline stages: contiguous, and the one that the whole run is shortest with.

The time of a split is a closed estimate, the mean of two for each stage of the curriculum: the work of the busiest
pipeline stage, which no schedule beats; and the time if all pipeline stages begin and end each round together. Where
features are fed back a pass waits for the one before, and simulated schedules lie between the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sleeptrain.config.schema import Config
from sleeptrain.config.task_rows import row_length, targets_share
from sleeptrain.errors import ConfigError
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.parallel.pipeline.stages import PipelineStages, num_trained
from sleeptrain.parallel.pipeline.task_costs import Costs
from sleeptrain.sleep.curriculum import StepShape, shape_starts, stage_shape
from sleeptrain.sleep.flops import layer_flops
from sleeptrain.sleep.rounds import Round, WindowFacts, plan_rounds, round_layers, window_spans

# Splits whose times differ by less than this share are equal: the estimate is no more exact.
TIE = 0.002


def split_stages(config: Config, num_stages: int) -> PipelineStages:
    """The pipeline stages of a run. They never change during the run, so they suit its whole curriculum.

    Raises ConfigError if there are more stages than layers.
    """
    model, sleep = config.model, config.sleep
    if num_stages > len(model.layers):
        raise ConfigError(f"parallel.pipeline={num_stages} is more than the {len(model.layers)} blocks of model.layers")
    core = (sleep.core[0], sleep.core[1]) if sleep.core else (0, len(model.layers))
    bounds = best_bounds(split_costs(config), num_stages) if num_stages > 1 else (0, len(model.layers))
    return PipelineStages(
        bounds, tuple(model.layers), core, sleep.eviction == "sliding", splits_head(config, num_stages)
    )


def splits_head(config: Config, num_stages: int) -> bool:
    """True if the stages share the head (`parallel.split_head`)."""
    return config.parallel.split_head and num_stages > 1


def schedule_costs(config: Config) -> Costs:
    """The costs that the schedule is made for: the head, in units of an average layer's cost in one pass."""
    flops = _one_pass(config, config.sleep.window)
    return Costs(head=_head(config) * len(flops) / sum(flops))


@dataclass(frozen=True)
class SplitCosts:
    """What a split is chosen by.

    kinds: for each kind of round, the forward cost of each layer, with the head in the last one. A head that all stages
        share is in none: it is equal for all splits.
    weights: for each stage of the curriculum, the weight of each kind: rounds of the run, a backward counted as three.
    rings: for each stage of the curriculum, whether its rounds feed features back.
    sizes: parameters of each layer, with the embedding in the first and an unshared head in the last one.
    """

    kinds: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    rings: tuple[bool, ...]
    sizes: tuple[float, ...]


def split_costs(config: Config) -> SplitCosts:
    """The costs of a run's rounds. A sampled N counts as all its values, in equal parts."""
    costs = Costs()
    kinds: dict[tuple[float, ...], int] = {}
    weights: list[dict[int, float]] = []
    rings = []
    for share, shape in _shapes(config):
        weight: dict[int, float] = defaultdict(float)
        rounds = _typical_rounds(config, shape)
        for index, r in enumerate(rounds):
            kind = kinds.setdefault(_costs_of(config, r, rounds, shape.window), len(kinds))
            times = costs.forward + (costs.backward if index < num_trained(rounds) else 0)
            weight[kind] += share * r.length / row_length(config.data) * times
        weights.append(weight)
        rings.append(any(r.feeds_back for r in rounds))
    model = config.model
    sizes = [flops / 2 for flops in _one_pass(config, config.sleep.window)]
    sizes[0] += model.vocab_size * model.dim
    if not config.parallel.split_head:
        sizes[-1] += model.vocab_size * model.dim
    by_stage = tuple(tuple(weight.get(kind, 0.0) for kind in range(len(kinds))) for weight in weights)
    return SplitCosts(tuple(kinds), by_stage, tuple(rings), tuple(sizes))


def split_time(costs: SplitCosts, bounds: Sequence[int]) -> float:
    """The estimate of the run's time with these stages, in FLOPs by token. See the head of this module."""
    parts = [_part(costs, start, stop) for start, stop in pairwise(bounds)]
    return _time(costs, tuple(map(max, zip(*parts, strict=True))))


def best_bounds(costs: SplitCosts, num_stages: int) -> tuple[int, ...]:
    """The bounds of the split with the least time; among equal ones, with the smallest stage, then the most even.

    For each number of last stages it keeps the splits that no other one beats in every part of the time.
    """
    num_layers = len(costs.sizes)
    mean = tuple(value / num_stages for value in _part(costs, 0, num_layers))
    known = _even(costs, num_stages)
    limit = split_time(costs, known) * (1 + TIE)
    ends: dict[int, list[_End]] = {num_layers: [_End((0.0,) * len(mean), 0.0, 0.0, (num_layers,))]}
    for stage in reversed(range(num_stages)):
        longer: dict[int, list[_End]] = {}
        for stop, suffixes in ends.items():
            for start in reversed(range(stage, stop)) if stage else [0]:
                part = _part(costs, start, stop)
                if _time(costs, tuple(map(max, part, mean))) > limit:
                    break
                size = sum(costs.sizes[start:stop])
                for end in suffixes:
                    most = tuple(map(max, part, end.most))
                    if _time(costs, tuple(map(max, most, mean))) <= limit:
                        new = _End(most, max(size, end.size), part[0] ** 2 + end.squares, (start, *end.bounds))
                        _keep(longer.setdefault(start, []), new)
        ends = longer
    found = ends.get(0, [])
    if not found:
        return known
    least = min(_time(costs, end.most) for end in found) * (1 + TIE)
    return min((e for e in found if _time(costs, e.most) <= least), key=lambda e: (e.size, e.squares, e.bounds)).bounds


@dataclass(frozen=True)
class _End:
    """The last stages of a split.

    most: the largest part of any of them, in each term of the time. size: parameters of the largest one. squares: of
    their parts, which are the least if they are even.
    """

    most: tuple[float, ...]
    size: float
    squares: float
    bounds: tuple[int, ...]

    def beats(self, other: _End) -> bool:
        mine, others = (*self.most, self.size), (*other.most, other.size)
        if mine == others:
            return self.squares <= other.squares
        return all(a <= b for a, b in zip(mine, others, strict=True))


def _keep(ends: list[_End], new: _End) -> None:
    if not any(end.beats(new) for end in ends):
        ends[:] = [end for end in ends if not new.beats(end)]
        ends.append(new)


def _part(costs: SplitCosts, start: int, stop: int) -> tuple[float, ...]:
    """A stage's terms of the time: its work in each stage of the curriculum, then its cost in each kind of round."""
    kinds = [sum(kind[start:stop]) for kind in costs.kinds]
    works = [sum(w * kind for w, kind in zip(weight, kinds, strict=True)) for weight in costs.weights]
    return (*works, *kinds)


def _time(costs: SplitCosts, most: Sequence[float]) -> float:
    """The time of the run. most: the largest part of any stage, in each term."""
    works, kinds = most[: len(costs.weights)], most[len(costs.weights) :]
    total = 0.0
    for work, weight, ring in zip(works, costs.weights, costs.rings, strict=True):
        in_step = sum(w * kind for w, kind in zip(weight, kinds, strict=True)) if ring else work
        total += (work + in_step) / 2
    return total


def _even(costs: SplitCosts, num_stages: int) -> tuple[int, ...]:
    """A split to begin with: each stage ends at the layer that brings it nearest to its share of all work."""
    work = [_part(costs, i, i + 1)[: len(costs.weights)] for i in range(len(costs.sizes))]
    layers, bounds = [sum(part) for part in work], [0]
    for stage in range(num_stages - 1):
        remaining, start = num_stages - stage, bounds[-1]
        share = sum(layers[start:]) / remaining
        last = len(layers) - remaining + 1
        bounds.append(min(range(start + 1, last + 1), key=lambda stop: abs(sum(layers[start:stop]) - share)))
    return (*bounds, len(layers))


def _shapes(config: Config) -> Iterator[tuple[float, StepShape]]:
    """(share of the run's tokens, shape) of each stage of the curriculum that the run reaches."""
    total = config.train.tokens
    starts = [start for start in shape_starts(config) if start < total]
    for start, stop in pairwise([*starts, total]):
        shape = stage_shape(config, start)
        numbers = range(1, shape.passes + 1) if config.sleep.sample_passes else [shape.passes]
        for passes in numbers:
            yield (stop - start) / total / len(numbers), StepShape(passes, shape.window, shape.batch)


def _typical_rounds(config: Config, shape: StepShape) -> list[Round]:
    """The rounds of a row: in text all windows have targets and are read later, in a task only the last has targets."""
    text = config.data.source == "shards"
    spans = window_spans(row_length(config.data), shape.window)
    facts = [WindowFacts(*span, (text or span == spans[-1],), (text or span != spans[-1],)) for span in spans]
    return plan_rounds(facts, shape.passes, config.sleep.when, config.sleep.feedback)


def _costs_of(config: Config, r: Round, rounds: Sequence[Round], window: int) -> tuple[float, ...]:
    """The forward FLOPs of a round by token in each layer; those of the head are in the last one."""
    model, sleep = config.model, config.sleep
    core = (sleep.core[0], sleep.core[1]) if sleep.core else (0, len(model.layers))
    layers = round_layers(r, model.layers, core, sleep.eviction == "sliding")
    costs = [flops if layer in layers else 0.0 for layer, flops in enumerate(_one_pass(config, window))]
    if r.state_only and layers:
        costs[layers[-1]] = layer_flops(model, layers[-1]).state
    if r.loss and not config.parallel.split_head:
        costs[-1] += _head(config) * row_length(config.data) / sum(other.length for other in rounds if other.loss)
    return tuple(costs)


def _one_pass(config: Config, window: int) -> list[float]:
    """The forward FLOPs of each layer by token in a pass over a window."""
    known: dict[tuple[str, bool], float] = {}
    keys = [(kind, layer in config.model.mixer_only) for layer, kind in enumerate(config.model.layers)]
    for layer, key in enumerate(keys):
        if key not in known:
            cost, reach = layer_flops(config.model, layer), block_spec(config.model, layer).reach(window)
            known[key] = cost.state + cost.features + cost.pair * (reach - reach**2 / (2 * window))
    return [known[key] for key in keys]


def _head(config: Config) -> float:
    """Forward FLOPs of the head per token, averaged over all tokens; a token without a target costs none."""
    return 2 * config.model.dim * config.model.vocab_size * targets_share(config.data)
