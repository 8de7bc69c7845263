"""The expected cost of a run, in one line, which is printed when the run starts."""

from __future__ import annotations

from dataclasses import replace

from sleeptrain.config.schema import Config
from sleeptrain.plan.mean_row import MeanRow
from sleeptrain.plan.parameters import count_parameters
from sleeptrain.plan.report import short


def expected_cost(config: Config) -> str:
    """Parameters, steps, tokens and model FLOPs (passes counted, recomputation not) up to `train.tokens`.

    `model.vocab_size` must be known. A sampled N counts as the mean over its values.
    """
    mean, steps, flops = MeanRow(config), 0, 0
    for _start, shape, num_steps in mean.stages():
        numbers = range(1, shape.passes + 1) if config.sleep.sample_passes else (shape.passes,)
        steps += num_steps
        flops += num_steps * sum(mean.step_flops(replace(shape, passes=n)) for n in numbers) // len(numbers)
    return (
        f"{config.run.name}: {short(count_parameters(config)[0])} parameters, about {steps:,} "
        f"step{'s' if steps > 1 else ''}, {short(config.train.tokens)} tokens and {short(flops)} FLOPs"
    )
