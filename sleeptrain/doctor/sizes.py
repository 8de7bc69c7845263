"""The size of a run's checkpoints, and the number that it keeps."""

from __future__ import annotations

from dataclasses import replace

from sleeptrain.checkpoint.keep import superfluous
from sleeptrain.config.schema import Config, ParallelConfig
from sleeptrain.health.rollbacks import reach
from sleeptrain.plan.parameters import held_parameters, training_state
from sleeptrain.plan.workload import workloads


def checkpoint_bytes(config: Config) -> int:
    """Bytes of weights and optimizer state, the same under every layout. `model.vocab_size` must be set."""
    [held] = held_parameters(replace(config, parallel=ParallelConfig()), [0, len(config.model.layers)])
    state = training_state(held, 0, (1, 1, 1))
    return state.weights + state.optimizer


def num_kept(config: Config) -> int:
    """The number of checkpoints at the end of the run. `model.vocab_size` must be set."""
    num_steps = sum(w.num_steps for w in workloads(config, 1))
    steps = sorted({0, num_steps, *range(0, num_steps, config.checkpoint.every or num_steps)})
    removed = superfluous(steps, config.checkpoint.keep, config.checkpoint.keep_every, reach(config.health))
    return len(steps) - len(removed)
