"""Jet-Nemotron's published code against sleeptrain's layers."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.hf.families import family_of
from tests.hf.published.small import imported, once
from tests.sleep.oracle import causal_layout


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@torch.no_grad()
def test_jet_nemotron_has_the_same_logits(dtype: torch.dtype, atol: float):
    theirs, ours = (model.to(dtype) for model in imported("jet_nemotron"))
    tokens = torch.randint(17, (2, 70))
    x, _ = ours.run(ours.embed(tokens), ours.empty_state(), causal_layout(70))
    torch.testing.assert_close(ours.logits(x), once(theirs, tokens), rtol=0, atol=atol)


def test_jet_nemotron_has_the_same_gradients():
    theirs, ours = imported("jet_nemotron")
    tokens = torch.randint(17, (2, 40))
    x, _ = ours.run(ours.embed(tokens), ours.empty_state(), causal_layout(40))
    direction = torch.randn(2, 40, 17)
    (ours.logits(x) * direction).sum().backward()
    (once(theirs, tokens) * direction).sum().backward()
    found = {name: p.grad for name, p in ours.named_parameters()}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, gradient in family_of("jet_nemotron").to_theirs(ours.config, found.__getitem__):
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-3, f"{name}: relative error {error:.1e}"
