"""Ouro's published code against sleeptrain's layers."""

from __future__ import annotations

import torch

from tests.hf.published.small import imported
from tests.sleep.oracle import causal_layout


@torch.no_grad()
def test_ouros_loops_are_passes():
    """Without a memory, N passes over one window are N loops of Ouro, and the logits after each are the same."""
    theirs, ours = (model.double() for model in imported("ouro"))
    tokens = torch.randint(17, (2, 30))
    x, y = ours.embed(tokens), theirs.embed(tokens)
    for _ in range(4):
        y, _ = theirs.loop(y, theirs.empty_memory())
        x, _ = ours.run(x, ours.empty_state(), causal_layout(30))
        torch.testing.assert_close(ours.logits(x), theirs.predict(y), rtol=0, atol=1e-12)
        x = ours.fed_back(x)
