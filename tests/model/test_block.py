"""The options of a block, and the features that are fed back, against their definitions."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import HARD
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.rounds import plan_rounds, window_facts
from tests.models import random_batch, tiny_config, tiny_model
from tests.sleep.oracle import causal_layout


def run_block(model, x, layer=0):
    return model.blocks[layer](x, None, causal_layout(x.shape[1]), HARD)[0]


def features(num_tokens=6):
    torch.manual_seed(0)
    return torch.randn(1, num_tokens, 16, dtype=torch.float64)


def rms(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


@pytest.mark.parametrize("kind", ["zero_centred", "plain"])
def test_sandwich_norms_follow_mixer_and_feed_forward(kind):
    model, x = tiny_model(["attention"], sandwich_norms=True, norm=kind), features()
    block, one = model.blocks[0], float(kind == "zero_centred")
    mixed, _ = block.mixer(rms(x, one + block.mixer_norm.weight), None, causal_layout(6), HARD)
    middle = x + rms(mixed, one + block.mixer_post_norm.weight)
    end = middle + rms(block.mlp(rms(middle, one + block.mlp_norm.weight)), one + block.mlp_post_norm.weight)
    torch.testing.assert_close(run_block(model, x), end)


def test_norms_begin_as_the_identity_scale():
    for kind, value in (("zero_centred", 0.0), ("plain", 1.0)):
        model = Hybrid(tiny_config(["attention"], norm=kind, sandwich_norms=True))
        model.init_weights(0)
        norms = {name: p for name, p in model.named_parameters() if "norm" in name}
        assert len(norms) == 4 + 2 + 1 and all(bool((p == value).all()) for p in norms.values())


@pytest.mark.parametrize("kind", ["jet", "gated_deltanet", "attention"])
def test_a_mixer_alone_begins_as_the_identity_and_can_learn(kind):
    model = Hybrid(tiny_config([kind, kind], mixer_only=[1], sandwich_norms=True)).double()
    model.init_weights(0)
    names = {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("blocks.1.")}
    assert names == {"mixer", "mixer_norm"}
    x = features().requires_grad_()
    y = run_block(model, x, layer=1)
    assert torch.equal(y, x) and not torch.equal(run_block(model, x), x)
    (y * torch.randn_like(y)).sum().backward()
    out = model.blocks[1].mixer.o_proj if kind == "attention" else model.blocks[1].mixer.out_proj
    assert out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("between", [True, False])
def test_the_last_norm_between_passes(between):
    """Three passes over one window by hand: features that are fed back are normed; those that predict, once."""
    model = tiny_model(["attention", "gated_deltanet"], norm_between_passes=between)
    batch = random_batch([[0] * 12])
    rounds = plan_rounds(window_facts(batch, 6), 3)
    losses, state = run_rounds(model, batch, rounds, model.empty_state(), LoopSettings((0, 2)))
    x, S = model.embed(batch.tokens_BT[:, :6]), model.empty_state()
    for n in range(3):
        x, S = model.run(x, S, causal_layout(6))
        if n == 0:
            torch.testing.assert_close(losses[0], model.cross_entropy(x[0], batch.targets_BT[0, :6]))
        x = model.norm(x) if between else x
    x, S = model.run(model.embed(batch.tokens_BT[:, 6:]), S, causal_layout(6))
    torch.testing.assert_close(losses[1], model.cross_entropy(x[0, :5], batch.targets_BT[0, 6:11]))
    torch.testing.assert_close(state[1].S_BHKV, S[1].S_BHKV)
