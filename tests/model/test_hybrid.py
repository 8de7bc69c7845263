from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.norm import GatedRMSNorm, rms_norm
from sleeptrain.model.rope import rope_tables, rotate
from tests.models import tiny_config, tiny_model
from tests.sleep.oracle import causal_layout

LAYERS = ["attention", "gated_deltanet", "mamba2"]


def test_state_only_leaves_the_same_state_and_no_features():
    model = tiny_model()
    x = model.embed(torch.arange(6)[None])
    _, full = model.run(x, model.empty_state(), causal_layout(6))
    features, state = model.run(x, model.empty_state(), causal_layout(6), state_only=True)
    assert features is None
    for a, b in zip(full.layers[1:], state.layers[1:], strict=True):
        assert torch.equal(a.S_BHKV, b.S_BHKV)


def test_state_only_stops_behind_the_last_recurrent_layer():
    model = tiny_model(["gated_deltanet", "attention"])
    called = []
    model.blocks[1].register_forward_hook(lambda *_: called.append(1))
    model.run(model.embed(torch.arange(6)[None]), model.empty_state(), causal_layout(6), state_only=True)
    assert not called


def test_decays_stay_fp32_when_the_model_is_cast():
    model = Hybrid(tiny_config(LAYERS))
    model.init_weights(0)
    before = model.blocks[1].mixer.A_log.clone()
    model.bfloat16()
    assert model.blocks[0].mixer.q_proj.weight.dtype == torch.bfloat16
    for mixer in (model.blocks[1].mixer, model.blocks[2].mixer):
        assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert torch.equal(model.blocks[1].mixer.A_log, before)
    assert model.double().blocks[1].mixer.A_log.dtype == torch.float64


def test_a_fresh_model_remembers_a_window():
    """Half of the heads keep more than a tenth of their state over 64 tokens; with dt_bias = 1 none keeps 1e-6."""
    model = Hybrid(tiny_config(["gated_deltanet"] * 8))
    model.init_weights(0)
    rates = torch.stack([-m.A_log.exp() * F.softplus(m.dt_bias) for m in (b.mixer for b in model.blocks.values())])
    kept = (64 * rates).exp()
    assert (kept > 0.1).float().mean() > 0.3
    assert (-64 * 8 * F.softplus(torch.tensor(1.0))).exp() < 1e-6


def test_weights_depend_on_seed_and_name_alone():
    a, b, c = (Hybrid(tiny_config(layers)) for layers in (LAYERS, LAYERS[:2], LAYERS))
    a.init_weights(1)
    b.init_weights(1)
    c.init_weights(2)
    for name, parameter in b.named_parameters():
        if not name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):  # scaled by depth
            assert torch.equal(parameter, dict(a.named_parameters())[name]), name
    assert not torch.equal(a.embedding.weight, c.embedding.weight)


@pytest.mark.parametrize("shape", [(3, 5, 8), (7, 8)])
def test_rms_norm_equals_torchs(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64)
    weight.requires_grad_()
    ours, theirs = rms_norm(x, weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    a = torch.autograd.grad((ours * direction).sum(), (x, weight))
    b = torch.autograd.grad((theirs * direction).sum(), (x, weight))
    torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, weight))


def test_gate_before_or_behind_the_norm():
    x, gate = torch.randn(4, 8), torch.randn(4, 8)
    for first in (True, False):
        norm = GatedRMSNorm(8, 1e-6, gate_first=first)
        expected = F.rms_norm(x * F.silu(gate), (8,)) if first else F.rms_norm(x, (8,)) * F.silu(gate)
        torch.testing.assert_close(norm(x, gate), expected, rtol=1e-4, atol=1e-4)


def test_rotation_is_relative():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for first in (-3, 0, 50):
        tables = rope_tables(first, 6, 8, 0.5, 1e4, q)
        turned = [rotate(t.expand(1, 6, 1, 8), tables)[0, :, 0] for t in (q, k)]
        scores.append(turned[0] @ turned[1].T)
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])
    assert not torch.allclose(scores[0][0, 0], scores[0][0, 5])


@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_a_model_compute_what_the_whole_does(tied):
    whole = tiny_model(tie_embeddings=tied)
    weights = whole.state_dict()
    lower, upper = (Hybrid(whole.config, layers).double() for layers in (range(1), range(1, 3)))
    for part in (lower, upper):
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
    assert {*lower.state_dict(), *upper.state_dict()} == set(weights)
    assert ("embedding.weight" in upper.state_dict()) == tied
    tokens, layout = torch.arange(6)[None], causal_layout(6)
    x, state = lower.run(lower.embed(tokens), lower.empty_state(), layout)
    x, state = upper.run(x, state, layout)
    y, expected = whole.run(whole.embed(tokens), whole.empty_state(), layout)
    torch.testing.assert_close(upper.logits(x), whole.logits(y), rtol=0, atol=0)
    for ours, theirs in zip(state.to_state_dict().values(), expected.to_state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
