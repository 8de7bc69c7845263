"""What a run will cost, in one line, as it is said when it begins."""

from __future__ import annotations

from sleeptrain.config.schema import Config
from sleeptrain.plan.parameters import count_parameters
from sleeptrain.plan.report import short
from sleeptrain.plan.workload import workloads


def expected_cost(config: Config, replicas: int) -> str:
    """Steps, tokens and model FLOPs (passes counted, recomputed ones not) up to `train.tokens`.

    `model.vocab_size` must be known. Sampled N counts as its largest.
    """
    stages = workloads(config, replicas)
    steps = sum(w.num_steps for w in stages)
    flops = sum(w.num_steps * w.flops(config) for w in stages)
    return (
        f"{config.run.name}: {short(count_parameters(config)[0])} parameters, about {steps:,} steps, "
        f"{short(config.train.tokens)} tokens and {short(flops)} FLOPs"
    )
