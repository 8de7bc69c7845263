"""Small models of every family, ours and theirs with the same weights."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

from sleeptrain.config.schema import ModelConfig
from sleeptrain.hf.families import Family
from sleeptrain.model.hybrid import Hybrid
from tests.models import tiny_config

HYBRID = ["gated_deltanet", "attention", "gated_deltanet"]

# By a name for the test: the family and a model that it expresses.
MODELS: dict[str, tuple[str, ModelConfig]] = {
    "qwen3_5_text": ("qwen3_5_text", tiny_config(HYBRID)),
    "qwen3_5_text-untied": ("qwen3_5_text", tiny_config(HYBRID, tie_embeddings=False)),
    "qwen3_5_text-transformer": ("qwen3_5_text", tiny_config(["attention", "attention"])),
    "qwen3_next": ("qwen3_next", tiny_config(HYBRID)),
    "qwen3_next-untied": ("qwen3_next", tiny_config(HYBRID, tie_embeddings=False)),
}


def disturbed(config: ModelConfig, seed: int = 0) -> Hybrid:
    """A model in fp32 whose every parameter counts."""
    model = Hybrid(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def native(family: Family, ours: Hybrid) -> PreTrainedModel:
    """The same model in transformers' own class."""
    config = transformers.AutoConfig.for_model(**family.to_config(ours.config))
    theirs = getattr(transformers, family.architecture)(config)
    weights = dict(family.to_theirs(ours.config, dict(ours.named_parameters()).__getitem__))
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if ours.config.tie_embeddings else set())
    theirs.tie_weights()
    return theirs.eval()
