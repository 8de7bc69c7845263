"""Which parameters ZeRO-3 keeps gathered: the head, and what is no weight matrix of an innermost module."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from sleeptrain.parallel.zero.gathered import keep_gathered
from tests.parallel.zero import cases


def test_the_head_and_what_is_no_matrix_of_an_innermost_module_stay() -> None:
    kept: list[torch.Tensor] = []
    zero = SimpleNamespace(register_external_parameter=lambda _call, parameter: kept.append(parameter))
    model = cases.small_model()
    keep_gathered(SimpleNamespace(zero=zero), nn.Identity(), model)
    stays = {name: any(p is k for k in kept) for name, p in model.named_parameters()}
    assert stays["embedding.weight"] and stays["norm.weight"], "tied to the head; no matrix"
    assert stays["blocks.1.mixer.conv_weight"], "of a module with others inside"
    assert not stays["blocks.0.mlp.up_proj.weight"] and not stays["blocks.1.mixer.out_proj.weight"]
