"""Transformers' own models over windows and passes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from sleeptrain.hf.convert.check import check, our_logits
from sleeptrain.hf.convert.native import load_native
from sleeptrain.hf.families import family_of
from tests.hf.convert.test_check import TOKENS
from tests.hf.models import MODELS, disturbed, native
from tests.models import VOCABULARY


@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid", "olmo_hybrid"])
def test_the_stock_forward_is_one_window_of_one_pass(name: str, tmp_path: Path):
    model_type, config = MODELS[name]
    ours = disturbed(config)
    theirs = native(family_of(model_type), ours, tmp_path)
    tokens = torch.randint(VOCABULARY, (2, TOKENS))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, our_logits(ours, tokens, TOKENS, 1), rtol=0, atol=1e-5)


def test_only_the_cpu_paths_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An installed package of GPU kernels replaces these functions, and fails on a CPU."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

    model_type, config = MODELS["qwen3_5_text"]
    family, ours = family_of(model_type), disturbed(config)
    native(family, ours, tmp_path)

    for name in ("causal_conv1d_fn", "torch_chunk_gated_delta_rule"):

        def kernel(*_: object, **__: object) -> None:
            raise RuntimeError("0 active drivers")

        monkeypatch.setattr(theirs, name, functools.wraps(getattr(theirs, name).__wrapped__)(kernel))
    check(config, dict(ours.named_parameters()).__getitem__, tmp_path, family, 64)
    with pytest.raises(RuntimeError, match="active drivers"):
        load_native(tmp_path, family)(torch.zeros(1, 4, dtype=torch.long))
