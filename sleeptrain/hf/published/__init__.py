"""Reference implementations of the models that transformers does not have. `check` compares ours with them.

sleeptrain never runs code that comes beside weights. This package computes the same, with the same names of parameters,
token by token, and without code of sleeptrain's layers: slow, and easy to compare with the original.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sleeptrain.hf.convert.config_file import read_config, understanding
from sleeptrain.hf.convert.weight_files import WeightFiles
from sleeptrain.hf.families import Family
from sleeptrain.hf.published.jet_nemotron import JetNemotron
from sleeptrain.hf.published.ouro import Ouro
from sleeptrain.hf.published.parts import Published

PUBLISHED: dict[str, Callable[[Mapping[str, Any]], Published]] = {"jet_nemotron": JetNemotron, "ouro": Ouro}


def load_published(folder: Path, family: Family) -> Published:
    """The model of a folder, in fp32 on the CPU. Raises UserError: a file or a setting is missing or wrong."""
    settings = read_config(folder)
    files = WeightFiles(folder, family.canonical)
    with torch.device("meta"), understanding(folder / "config.json"):
        model = PUBLISHED[family.model_type](settings)
    model.load_state_dict({name: files.read(name).float() for name in model.state_dict()}, assign=True)
    return model


@torch.no_grad()
def published_logits(model: Published, tokens_BT: torch.Tensor, window: int, passes: int) -> torch.Tensor:
    """The logits [B, T, V] of the wake passes. Every window sleeps: `passes` passes, the wake pass counted."""
    memory, logits = model.empty_memory(), []
    for part_BL in tokens_BT.split(window, dim=1):
        x_BLD = model.embed(part_BL)
        for n in range(passes):
            x_BLD, memory = model.loop(x_BLD, memory)
            if n == 0:
                logits.append(model.predict(x_BLD))
    return torch.cat(logits, dim=1)
