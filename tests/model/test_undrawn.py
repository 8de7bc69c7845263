"""Models made without the values that torch draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sleeptrain.errors import ConfigError
from sleeptrain.model import hybrid
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.undrawn import lacks_values, undrawn
from tests.models import tiny_config

CPU = torch.device("cpu")
ALL = ["gated_deltanet", "attention", "mamba2", "jet"]


@pytest.mark.parametrize("tied", [True, False])
def test_first_weights_are_those_of_a_model_that_torch_has_drawn(tied: bool) -> None:
    config = tiny_config(ALL, tie_embeddings=tied)
    before = torch.get_rng_state()
    with undrawn(CPU):
        model = Hybrid(config)
    assert torch.equal(torch.get_rng_state(), before), "torch has drawn nothing"
    drawn = Hybrid(config)
    for one in (model, drawn):
        one.init_weights(3)
    for (name, ours), theirs in zip(model.named_parameters(), drawn.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_only_what_torch_would_draw_lacks_values() -> None:
    with undrawn(CPU):
        linear, norm = nn.Linear(3, 2), nn.LayerNorm(3)
    assert lacks_values(linear.weight) and lacks_values(linear.bias)
    assert not lacks_values(norm.weight) and bool((norm.weight == 1).all())
    assert not lacks_values(nn.Linear(3, 2).weight)


def test_the_device_is_that_of_all_parameters() -> None:
    with undrawn(torch.device("meta")):
        model = Hybrid(tiny_config(ALL))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_parameter_that_nobody_draws_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with undrawn(CPU):
        model = Hybrid(tiny_config(["attention"]))

    def forgets(*_: Any) -> None:
        return None

    monkeypatch.setattr(hybrid, "initial_weight", forgets)
    with pytest.raises(ConfigError, match=r"gives no initial values of embedding\.weight"):
        model.init_weights(0)
