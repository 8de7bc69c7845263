"""The weights of a folder that a family of transformers' models describes, under our names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import DataError
from sleeptrain.hf.configuration import MODEL_TYPE
from sleeptrain.hf.families import FAMILIES, family_of
from sleeptrain.hf.weight_files import WeightFiles
from sleeptrain.model.decay import DECAY_PARAMETERS


def is_native(place: Any) -> bool:
    """Whether it is a folder with a model of a family, not one that `SleepForCausalLM` has saved."""
    config = Path(place) / "config.json"
    return config.is_file() and _model_type(config) != MODEL_TYPE


def native_weights(folder: Path, config: ModelConfig, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Our parameters, in `dtype` (None: that of the files); decays are never narrower than fp32.

    Raises DataError where a file cannot be read, or a tensor is missing, left over or of another shape.
    """
    family = family_of(_model_type(folder / "config.json"))
    files, shapes = WeightFiles(folder, family.canonical), family.their_shapes(config)
    found = {name: form.shape for name, form in files.forms.items()}
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        name = wrong[0]
        raise DataError(
            f"{folder} does not hold the model of its config.json: {name} has shape {found.get(name, 'none')}, not "
            f"{shapes.get(name, 'none')} ({len(wrong)} such tensors)"
        )
    return {name: _typed(name, tensor, dtype) for name, tensor in family.to_ours(config, files.read)}


def _typed(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    dtype = dtype or tensor.dtype
    if name.rsplit(".", 1)[-1] in DECAY_PARAMETERS:
        dtype = torch.promote_types(dtype, torch.float32)
    return tensor.to(dtype).contiguous()


def _model_type(path: Path) -> str:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    # Models that also see images hold the text model's settings apart.
    own = found.get("model_type", "")
    return own if own in (*FAMILIES, MODEL_TYPE) else found.get("text_config", {}).get("model_type", own)
