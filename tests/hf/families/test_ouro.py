"""Ouro's settings and names."""

from __future__ import annotations

import torch

from sleeptrain.hf.convert.check import our_logits
from sleeptrain.hf.families import family_of
from tests.hf.published.small import imported


@torch.no_grad()
def test_an_export_of_ouro_says_that_it_has_one_loop():
    """The published code, which runs all loops and then predicts, computes of it what ours does at N=1."""
    theirs, ours = (model.double() for model in imported("ouro"))
    tokens = torch.randint(17, (2, 30))
    y = theirs.embed(tokens)
    for _ in range(family_of("ouro").to_config(ours.config)["total_ut_steps"]):
        y, _ = theirs.loop(y, theirs.empty_memory())
    torch.testing.assert_close(our_logits(ours, tokens, 30, 1), theirs.predict(y), rtol=0, atol=1e-12)
