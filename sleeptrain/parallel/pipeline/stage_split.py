"""The split of the layers into pipeline stages: contiguous, and as equal in cost as possible, all passes counted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from sleeptrain.config.schema import Config
from sleeptrain.config.task_rows import targets_share
from sleeptrain.config.validate import values_in_force
from sleeptrain.errors import ConfigError
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.parallel.pipeline.task_costs import Costs
from sleeptrain.sleep.flops import layer_flops


def split_stages(config: Config, num_stages: int) -> PipelineStages:
    """The pipeline stages of a run. They never change during the run, so they suit its largest number of passes.

    Raises ConfigError if there are more stages than layers.
    """
    model, sleep = config.model, config.sleep
    if num_stages > len(model.layers):
        raise ConfigError(f"parallel.pipeline={num_stages} is more than the {len(model.layers)} blocks of model.layers")
    costs = layer_costs(config)
    costs[-1] += _head(config)
    core = (sleep.core[0], sleep.core[1]) if sleep.core else (0, len(model.layers))
    sliding = sleep.eviction == "sliding"
    return PipelineStages(balanced_bounds(costs, num_stages), tuple(model.layers), core, sliding)


def schedule_costs(config: Config) -> Costs:
    """The costs that the schedule is made for: the head, in units of an average layer's cost in one pass."""
    flops = [_one_pass(config, layer) for layer in range(len(config.model.layers))]
    return Costs(head=_head(config) * len(flops) / sum(flops))


def layer_costs(config: Config) -> list[float]:
    """Forward FLOPs of each layer per token over all passes: prelude once, core N times, coda at most twice."""
    passes = max(value for _, value in values_in_force(config, "passes", config.sleep.passes, "sleep.passes"))
    first, last = config.sleep.core or (0, len(config.model.layers))
    costs = []
    for index in range(len(config.model.layers)):
        times = 1 if index < first else passes if index < last else min(passes, 2)
        costs.append(times * _one_pass(config, index))
    return costs


def balanced_bounds(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """The bounds of `num_stages` contiguous parts that minimise the cost of the most expensive part."""

    @cache
    def best(start: int, stages: int) -> tuple[float, tuple[int, ...]]:
        if stages == 1:
            return sum(costs[start:]), (start, len(costs))
        options = []
        for stop in range(start + 1, len(costs) - stages + 2):
            rest, bounds = best(stop, stages - 1)
            options.append((max(sum(costs[start:stop]), rest), (start, *bounds)))
        return min(options, default=(float("inf"), (start, len(costs))))

    return best(0, num_stages)[1]


def _one_pass(config: Config, layer: int) -> float:
    cost, reach = layer_flops(config.model, layer), block_spec(config.model, layer).reach(config.sleep.window)
    return cost.state + cost.features + cost.pair * (reach - reach**2 / (2 * config.sleep.window))


def _head(config: Config) -> float:
    """Forward FLOPs of the head per token, averaged over all tokens; a token without a target costs none."""
    return 2 * config.model.dim * config.model.vocab_size * targets_share(config.data)
