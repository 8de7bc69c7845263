"""The weights of a checkpoint in a model for evaluation or generation."""

from __future__ import annotations

import torch

from sleeptrain.checkpoint.fit import WEIGHTS, check_start
from sleeptrain.checkpoint.read import SavedTensors
from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.hybrid import Hybrid


def load_weights(config: ModelConfig, saved: SavedTensors) -> Hybrid:
    """The whole model with the weights of a checkpoint, as `assign_weights` gives them, and raises."""
    with torch.device("meta"):
        model = Hybrid(config)
    assign_weights(model, saved)
    return model


def assign_weights(model: Hybrid, saved: SavedTensors) -> None:
    """Give a whole model that was built on the meta device the weights of a checkpoint, on the CPU in their dtype.

    No other weights are made on the way. Raises DataError, with the model unchanged, if they do not fit the model.
    """
    check_start(saved.forms, model.config)
    model.load_state_dict({name: saved.tensor(WEIGHTS + name) for name, _ in model.named_parameters()}, assign=True)
