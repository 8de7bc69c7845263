"""What `sleeptrain plan` says is what the trainer then does."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.config.compose import compose
from sleeptrain.data.source import build_source
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.train.cost import describe, stage_costs
from sleeptrain.train.step import forward_backward

SMALL = ["data.rule110.width=6", "data.batch=8", "model.dim=16", "model.ffn_dim=16", f"train.tokens={12 * 8 * 7}"]


def rule110(*more: str):
    config = compose(["experiment=rule110", "sleep.passes=3", *SMALL, *more])
    config.model.vocab_size = 3
    return config


@pytest.mark.parametrize("more", [[], ["sleep.core=[1,2]"], ["sleep.eviction=sliding"], ["sleep.feedback=none"]])
def test_rounds_and_flops_are_those_of_a_step(more):
    config = rule110(*more)
    model = Hybrid(config.model)
    [stage] = stage_costs(config, model)
    result = forward_backward(model, build_source(config.data).batch(8), stage.shape, config, None)
    assert (stage.num_rounds, stage.flops) == (result.num_rounds, result.flops)
    assert stage.num_steps == 12


def test_stages_follow_the_curriculum():
    config = rule110("sleep.curriculum=[{tokens: 280, passes: 4}, {tokens: 400, batch: 4}, {tokens: 10000, passes: 9}]")
    stages = stage_costs(config, Hybrid(config.model))
    assert [(s.shape.passes, s.shape.batch, s.num_steps) for s in stages] == [(3, 8, 5), (4, 8, 3), (4, 4, 8)]
    assert stages[1].flops > stages[0].flops > 0


def test_sampled_passes_count_as_the_most():
    config = rule110("sleep.sample_passes=true")
    [stage] = stage_costs(config, Hybrid(config.model))
    assert stage.shape.passes == 3


def test_described_in_words():
    config = rule110()
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in Hybrid(config.model).parameters())
    text = describe(config)
    assert f"{num_parameters / 1000:.3g}k parameters" in text and "12 steps" in text


def test_an_unknown_vocabulary_is_refused(tmp_path):
    config = compose(["experiment=stdlib", f"data.shards.sources.0.train={tmp_path / 'none'}"])
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 0, and the data cannot say it: .*none"):
        describe(config)
