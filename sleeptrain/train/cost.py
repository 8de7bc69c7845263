"""What a run will do and cost, before it runs: the same plan that the trainer executes, told in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.data.shards import TokenShards
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.curriculum import StepShape, stage_shape
from sleeptrain.sleep.loop import loop_settings
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.tasks.rule110 import VOCAB_SIZE, Rule110Source
from sleeptrain.train.flops import step_flops


@dataclass(frozen=True)
class StageCost:
    """One stage of the curriculum: its shape, its steps, and of each step the rounds and FLOPs."""

    first_token: int
    shape: StepShape
    num_steps: int
    num_rounds: int
    flops: int


def describe(config: Config) -> str:
    """The stages of a run with their cost, and the model's size. Raises ConfigError for an unknown vocabulary."""
    config.model.vocab_size = config.model.vocab_size or _vocabulary(config)
    with torch.device("meta"):
        model = Hybrid(config.model)
    num_parameters = sum(p.numel() for p in model.parameters())
    stages = stage_costs(config, model)
    lines = [
        f"run       {config.run.root}/{config.run.name}",
        f"model     {_short(num_parameters)} parameters, width {config.model.dim}, {' '.join(config.model.layers)}",
        f"state     {_short(_state_bytes(config))}B of fast weights a row",
        f"tokens    {_short(config.train.tokens)}",
        "",
        f"{'from token':>12} {'N':>3} {'L':>6} {'rows':>5} {'steps':>8} {'rounds/step':>12} {'FLOPs/step':>11}",
    ]
    for s in stages:
        lines.append(
            f"{_short(s.first_token):>12} {s.shape.passes:>3} {s.shape.window:>6} {s.shape.batch:>5} {s.num_steps:>8} "
            f"{s.num_rounds:>12} {_short(s.flops):>11}"
        )
    total = sum(s.flops * s.num_steps for s in stages)
    lines += ["", f"in all    {sum(s.num_steps for s in stages)} steps, {_short(total)} FLOPs with all passes counted"]
    return "\n".join(lines)


def stage_costs(config: Config, model: Hybrid) -> list[StageCost]:
    """The cost of every stage that the run reaches; sampled N counts as its largest."""
    total = config.train.tokens
    starts = sorted({0, *(s.tokens for s in config.sleep.curriculum if s.tokens < total)})
    stages, seen = [], 0
    for start, stop in zip(starts, [*starts[1:], total], strict=True):
        shape = stage_shape(config, start)
        batch = _typical_batch(config, shape)
        num_tokens = batch.tokens_BT.numel()
        num_steps = max(-(-(stop - seen) // num_tokens), 0)
        seen += num_steps * num_tokens
        settings = loop_settings(config, shape.window, model.num_layers)
        rounds = plan_batch(batch, shape.window, shape.passes, config.sleep)
        num_targets = int((batch.targets_BT != IGNORE).sum())
        flops = step_flops(config.model, rounds, num_targets, settings.core, settings.boundary.sliding_window)
        stages.append(StageCost(start, shape, num_steps, len(rounds), flops))
    return stages


def _typical_batch(config: Config, shape: StepShape) -> Batch:
    """Rows in the middle of long documents; for a task, a batch of it."""
    if config.data.source == "rule110":
        return Rule110Source(config.data.rule110, config.data.seed).batch(shape.batch)
    zeros = torch.zeros(shape.batch, config.data.sequence, dtype=torch.long)
    goes_on = torch.ones(shape.batch, dtype=torch.bool)
    return Batch(zeros, zeros, zeros, goes_on, goes_on)


def _vocabulary(config: Config) -> int:
    if config.data.source == "rule110":
        return VOCAB_SIZE
    location = config.data.shards.sources[0].train
    try:
        return TokenShards(location).vocab_size
    except DataError as error:
        raise ConfigError(f"model.vocab_size is 0, and the data cannot say it: {error}") from error


def _state_bytes(config: Config) -> int:
    g, m = config.model.gated_deltanet, config.model.mamba2
    floats = {
        "attention": 0,
        "gated_deltanet": g.num_v_heads * g.head_k_dim * g.head_v_dim,
        "mamba2": m.num_heads * m.state_dim * m.head_dim,
    }
    return 4 * sum(floats[kind] for kind in config.model.layers)


def _short(number: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
