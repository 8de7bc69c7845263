"""Small models of the published code, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sleeptrain.hf.families import family_of
from sleeptrain.hf.published import PUBLISHED
from sleeptrain.hf.published.parts import Published
from sleeptrain.model.hybrid import Hybrid
from tests.hf.published_settings import JET_2B, OURO_1_4B

SMALL = {"vocab_size": 17, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4}
JET_KINDS = ["jet", "attn", "swa", "jet"]
JET_PARTS = {
    "jet": JET_2B["efficient_attention_config"]["jet"] | {"num_heads": 2, "head_dim": 12},
    "swa": {"window_size": 5},
}
REFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "jet_nemotron": (
        JET_2B,
        SMALL
        | {"num_key_value_heads": 2, "layer_types": JET_KINDS, "num_hidden_layers": 4}
        | {"efficient_attention_config": JET_PARTS},
    ),
    "ouro": (
        OURO_1_4B,
        SMALL
        | {"head_dim": 12, "num_key_value_heads": 4, "layer_types": ["full_attention"] * 3, "num_hidden_layers": 3},
    ),
}


def reference(model_type: str) -> tuple[Published, dict[str, Any]]:
    """A small model, in which every random weight has an effect, and its settings."""
    torch.manual_seed(0)
    published, small = REFERENCES[model_type]
    theirs = PUBLISHED[model_type](published | small)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
        theirs.model.embed_tokens.weight.mul_(0.1)  # logits of about 1
    return theirs, published | small


def imported(model_type: str) -> tuple[Published, Hybrid]:
    theirs, settings = reference(model_type)
    family = family_of(model_type)
    ours = Hybrid(family.from_config(settings))
    ours.load_state_dict(dict(family.to_ours(ours.config, theirs.state_dict().__getitem__)))
    return theirs, ours


def once(theirs: Published, tokens_BT: torch.Tensor) -> torch.Tensor:
    return theirs.predict(theirs.loop(theirs.embed(tokens_BT), theirs.empty_memory())[0])


def folder_of(model_type: str, folder: Path, **changes: torch.Tensor | None) -> Published:
    """Writes the files of a small model. changes: other tensors by name, None for a missing one."""
    theirs, settings = reference(model_type)
    weights = {**theirs.state_dict(), **changes}
    folder.mkdir()
    save_file({n: w for n, w in weights.items() if w is not None}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    return theirs
