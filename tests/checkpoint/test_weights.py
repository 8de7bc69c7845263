"""A checkpoint's weights are put into a model that has none yet."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.checkpoint.fit import WEIGHTS
from sleeptrain.checkpoint.weights import assign_weights
from sleeptrain.errors import DataError
from sleeptrain.model.hybrid import Hybrid
from tests.checkpoint.contents import InMemory
from tests.models import tiny_config


def trained() -> Hybrid:
    model = Hybrid(tiny_config(["attention", "gated_deltanet"]))
    model.init_weights(3)
    return model


def empty(model: Hybrid) -> Hybrid:
    with torch.device("meta"):
        return Hybrid(model.config)


def test_the_model_has_the_weights_bit_for_bit() -> None:
    model = trained()
    target = empty(model)
    assign_weights(target, InMemory({WEIGHTS + name: p.detach() for name, p in model.named_parameters()}))
    names = dict(model.named_parameters())
    assert {name for name, p in target.named_parameters() if torch.equal(p, names[name])} == set(names)


def test_weights_that_do_not_fit_are_refused() -> None:
    model = trained()
    tensors = {WEIGHTS + name: p.detach() for name, p in model.named_parameters()}
    tensors.pop(f"{WEIGHTS}embedding.weight")
    target = empty(model)
    with pytest.raises(DataError, match="embedding"):
        assign_weights(target, InMemory(tensors))
    assert all(p.is_meta for p in target.parameters())
