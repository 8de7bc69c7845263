"""The native model against transformers' own: same weights under mapped names, same logits, same gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from sleeptrain.errors import ConfigError
from sleeptrain.hf.qwen3_5 import from_hf, hf_config, hf_name, to_hf
from sleeptrain.model.hybrid import Hybrid
from tests.models import VOCABULARY, tiny_config
from tests.sleep.oracle import causal_layout

LAYERS = ["gated_deltanet", "attention", "gated_deltanet"]


def pair(tie: bool) -> tuple[Hybrid, Qwen3_5ForCausalLM]:
    config = tiny_config(LAYERS, tie_embeddings=tie)
    theirs = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**hf_config(config)))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = Hybrid(config)
    ours.load_state_dict(from_hf(theirs.state_dict(), config, list(ours.state_dict())))
    return ours, theirs


@pytest.mark.parametrize("tie", [True, False])
def test_same_logits_and_gradients(tie):
    torch.manual_seed(0)
    ours, theirs = pair(tie)
    tokens = torch.randint(VOCABULARY, (2, 70))
    x, _ = ours.run(ours.embed(tokens), ours.empty_state(), causal_layout(70))
    logits = ours.logits(x)
    expected = theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(logits)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = {hf_name(n, LAYERS): p.grad for n, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        mine = gradients[name].reshape(parameter.shape)
        error = (mine - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-3, f"{name}: relative error {error:.1e}"


def test_names_are_one_to_one():
    ours, theirs = pair(tie=True)
    exported = to_hf(ours.state_dict(), LAYERS)
    assert set(exported) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(exported[name], tensor), name


def test_what_the_architecture_lacks_is_refused():
    with pytest.raises(ConfigError, match="holds mamba2"):
        hf_config(tiny_config(["mamba2"]))
