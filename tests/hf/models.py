"""Small models of every family, as this package's model and as the family's, with the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from sleeptrain.config.schema import ModelConfig
from sleeptrain.hf.families import Family
from sleeptrain.model.hybrid import Hybrid
from tests.models import tiny_config

HYBRID = ["gated_deltanet", "attention", "gated_deltanet"]

MULTIPLIED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_divisor": 2.0}


def granite(rotary: float = 0.0, layers: list[str] | None = None, **changes: Any) -> ModelConfig:
    """Mamba-2 and plain attention."""
    config = tiny_config(layers or ["mamba2", "attention", "mamba2"], **({"norm": "plain"} | changes))
    scale = 0.3 if changes else 0.0
    config.attention = replace(config.attention, gate=False, qk_norm="none", partial_rotary_factor=rotary, scale=scale)
    config.mamba2 = replace(config.mamba2, num_groups=1)
    return config


def olmo(rotary: float = 0.0, neg_eigval: bool = True, **changes: Any) -> ModelConfig:
    """Gated DeltaNet with reflections, and attention with norms only after it."""
    config = tiny_config(HYBRID, **({"norm": "plain"} | changes))
    plain = {"gate": False, "qk_norm": "all", "post_norm": True, "partial_rotary_factor": rotary}
    config.attention = replace(config.attention, **plain)  # type: ignore[arg-type]
    config.gated_deltanet = replace(config.gated_deltanet, allow_neg_eigval=neg_eigval, norm_eps=1e-5)
    return config


# {name of a case: (family, a model that it expresses)}.
MODELS: dict[str, tuple[str, ModelConfig]] = {
    "qwen3_5_text": ("qwen3_5_text", tiny_config(HYBRID)),
    "qwen3_5_text-untied": ("qwen3_5_text", tiny_config(HYBRID, tie_embeddings=False)),
    "qwen3_5_text-transformer": ("qwen3_5_text", tiny_config(["attention", "attention"])),
    "qwen3_next": ("qwen3_next", tiny_config(HYBRID)),
    "qwen3_next-untied": ("qwen3_next", tiny_config(HYBRID, tie_embeddings=False)),
    "granitemoehybrid": ("granitemoehybrid", granite(**MULTIPLIED)),
    "granitemoehybrid-untied": ("granitemoehybrid", granite(rotary=1.0, tie_embeddings=False)),
    "granitemoehybrid-mamba": ("granitemoehybrid", granite(layers=["mamba2", "mamba2"])),
    "granitemoehybrid-transformer": ("granitemoehybrid", granite(layers=["attention", "attention"], rotary=1.0)),
    "olmo_hybrid": ("olmo_hybrid", olmo()),
    "olmo_hybrid-rope": ("olmo_hybrid", olmo(rotary=1.0, neg_eigval=False, tie_embeddings=False)),
}
QUICK = ("qwen3_5_text", "qwen3_next-untied", "granitemoehybrid", "olmo_hybrid")
# The cases of tests that would take long for all of them.
QUICK_OR_SLOW = [
    pytest.param(*model, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, model in MODELS.items()
]
# The same with zero-centred norms, which become plain ones.
ZERO_CENTRED: dict[str, tuple[str, ModelConfig]] = {
    "granitemoehybrid": ("granitemoehybrid", granite(norm="zero_centred")),
    "olmo_hybrid": ("olmo_hybrid", olmo(norm="zero_centred")),
}


def disturbed(config: ModelConfig, seed: int = 0, amount: float = 0.1) -> Hybrid:
    """A model in fp32 in which every parameter has an effect."""
    model = Hybrid(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)
    return model


def native(family: Family, ours: Hybrid, folder: Path) -> PreTrainedModel:
    """The same model in transformers' own class, which reads files in `folder`."""
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    weights = {name: w.contiguous() for name, w in family.to_theirs(ours.config, parameters.__getitem__)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family.to_config(ours.config)))
    theirs, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(theirs).__name__ == family.architecture
    assert not any(found.values()), found
    return theirs.eval()
