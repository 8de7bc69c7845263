"""Small sleeping models with transformers' interface, in fp64."""

from __future__ import annotations

from dataclasses import asdict

import torch
from transformers.utils import logging

from sleeptrain.config.schema import SleepConfig as Sleep
from sleeptrain.hf.model.configuration import SleepPretrainedConfig, sleep_dict
from sleeptrain.hf.model.modeling import SleepForCausalLM
from sleeptrain.sleep.stop_gate import read_gate
from tests.models import tiny_config, tiny_model

logging.disable_progress_bar()

WINDOW = 4


def sleeping(layers: list[str] | None = None, **sleep: object) -> SleepForCausalLM:
    settings = {"passes": 3, "window": WINDOW, **sleep}
    model = SleepForCausalLM(SleepPretrainedConfig(model=asdict(tiny_config(layers)), sleep=settings)).double().eval()
    model.model.load_state_dict(tiny_model(layers).state_dict())
    return model


def gated(settings: Sleep) -> SleepForCausalLM:
    """A model that holds the gate of these settings, as one that was exported with them."""
    gate = read_gate(settings.stop_gate)
    config = SleepPretrainedConfig(
        model=asdict(tiny_config()), sleep=sleep_dict(settings), stop_gate_passes=gate.most_passes
    )
    model = SleepForCausalLM(config).double().eval()
    model.model.load_state_dict(tiny_model().state_dict())
    assert model.stop_gate is not None
    model.stop_gate.load_state_dict(gate.state_dict())
    return model


def settings_of(model: SleepForCausalLM) -> Sleep:
    return model.config.sleep_settings()


def padded(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of a batch; ids at pads are arbitrary."""
    num_tokens = max(map(len, rows))
    ids = torch.full((len(rows), num_tokens), 5)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        at = slice(num_tokens - len(row), None) if side == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask}
