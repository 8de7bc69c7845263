"""Transformers' own models compared with the training loop, window by window and pass by pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import DataError
from sleeptrain.hf.convert.check import TOLERANCE, check, our_logits
from sleeptrain.hf.convert.native import load_native, native_logits
from sleeptrain.hf.families import family_of
from tests.hf.models import MODELS, QUICK_OR_SLOW, disturbed, native
from tests.models import VOCABULARY

TOKENS = 37


FEW = [(1, 1), (2, 2), (4, 3)]
ALL = [(windows, passes) for windows in (1, 2, 3, 4) for passes in (1, 2, 3)]


@pytest.mark.parametrize("shapes", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize(("model_type", "config"), QUICK_OR_SLOW)
def test_same_logits_over_windows_and_passes(model_type: str, config: ModelConfig, shapes, tmp_path: Path):
    family, ours = family_of(model_type), disturbed(config, amount=0.05)
    native(family, ours, tmp_path)
    theirs = load_native(tmp_path, family)
    tokens = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    for windows, passes in shapes:
        window = -(-TOKENS // windows)
        expected = our_logits(ours, tokens, window, passes)
        error = (native_logits(theirs, tokens, window, passes) - expected).abs().max().item()
        assert error <= 1e-5, f"{windows=} {passes=}: {error:.1e}"
    # More passes change the last window's logits, unless a model keeps nothing between windows.
    assert torch.equal(expected, our_logits(ours, tokens, window, 1)) == (set(config.layers) == {"attention"})


@pytest.mark.parametrize(
    "name", ["blocks.0.mixer.A_log", "blocks.1.mixer.k_norm.weight", "norm.weight", "blocks.2.mlp.up_proj.weight"]
)
def test_one_wrong_tensor_fails_the_check(name: str, tmp_path: Path):
    model_type, config = MODELS["qwen3_5_text"]
    family, ours = family_of(model_type), disturbed(config)
    native(family, ours, tmp_path)
    weights = {n: p.detach().clone() for n, p in ours.named_parameters()}
    assert check(config, weights.__getitem__, tmp_path, family, 64) < TOLERANCE
    weights[name].flatten()[0] += 0.1
    with pytest.raises(DataError, match="the check failed: over 4 windows of 3 passes"):
        check(config, weights.__getitem__, tmp_path, family, 64)
    weights[name].flatten()[0] = float("nan")
    with pytest.raises(DataError, match="the check failed"):
        check(config, weights.__getitem__, tmp_path, family, 64)
