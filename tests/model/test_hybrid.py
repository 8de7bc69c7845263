from __future__ import annotations

import pytest
import torch

from sleeptrain.model.hybrid import Hybrid
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


def test_state_only_stops_after_the_last_recurrent_layer():
    model = tiny_model(["gated_deltanet", "attention"])
    called = []
    model.blocks[1].register_forward_hook(lambda *_: called.append(1))
    model.run(model.embed(torch.arange(6)[None]), model.empty_state(), causal_layout(6), state_only=True)
    assert not called


def test_weights_depend_on_seed_and_name_alone():
    a, b, c = (Hybrid(tiny_config(layers)) for layers in (LAYERS, LAYERS[:2], LAYERS))
    a.init_weights(1)
    b.init_weights(1)
    c.init_weights(2)
    for name, parameter in b.named_parameters():
        if not name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):  # scaled by depth
            assert torch.equal(parameter, dict(a.named_parameters())[name]), name
    assert not torch.equal(a.embedding.weight, c.embedding.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_a_model_compute_what_the_full_model_does(tied):
    full = tiny_model(tie_embeddings=tied)
    weights = full.state_dict()
    lower, upper = (Hybrid(full.config, layers).double() for layers in (range(1), range(1, 3)))
    for part in (lower, upper):
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
    assert {*lower.state_dict(), *upper.state_dict()} == set(weights)
    assert ("embedding.weight" in upper.state_dict()) == tied
    tokens, layout = torch.arange(6)[None], causal_layout(6)
    x, state = lower.run(lower.embed(tokens), lower.empty_state(), layout)
    x, state = upper.run(x, state, layout)
    y, expected = full.run(full.embed(tokens), full.empty_state(), layout)
    torch.testing.assert_close(upper.logits(x), full.logits(y), rtol=0, atol=0)
    for ours, theirs in zip(state.to_state_dict().values(), expected.to_state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
