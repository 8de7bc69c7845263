"""An autograd function as an operator has the same values and gradients, and compiled code calls it as one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sleeptrain.ops.conv import _CausalConv
from sleeptrain.ops.conv import _operator as conv_operator
from sleeptrain.ops.gated_delta_rule import _GatedDeltaRule
from sleeptrain.ops.gated_delta_rule import _operator as delta_operator
from sleeptrain.ops.ssd import _SSD
from sleeptrain.ops.ssd import _operator as ssd_operator

B, T, H, G, K, V, D = 2, 70, 2, 4, 6, 5, 8


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def resets() -> torch.Tensor:
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, 30] = reset[1, 1] = True
    return reset


def delta_rule(some: bool) -> list[Any]:
    q, k, v = normal(B, T, H, K), normal(B, T, H, K, seed=1), normal(B, T, G, V, seed=2)
    g, beta = -normal(B, T, G, seed=3).exp(), normal(B, T, G, seed=4).sigmoid()
    return [q, k, v, g, beta, normal(B, G, K, V, seed=5) if some else None, resets() if some else None, some, "save"]


def state_space(some: bool) -> list[Any]:
    C, b, x = normal(B, T, H, K), normal(B, T, H, K, seed=1), normal(B, T, G, V, seed=2)
    dt, A = normal(B, T, G, seed=3).exp(), -normal(G, seed=4).exp()
    return [C, b, x, dt, A, normal(B, G, K, V, seed=5) if some else None, resets() if some else None, "save"]


def convolution(some: bool) -> list[Any]:
    optional = [normal(D, seed=2), normal(B, 3, D, seed=3), resets(), normal(B, T, seed=4) > -1]
    return [normal(B, T, D), normal(D, 4, seed=1), *(optional if some else [None] * 4)]


CASES = {
    "gated delta rule": (_GatedDeltaRule, delta_operator, delta_rule),
    "ssd": (_SSD, ssd_operator, state_space),
    "convolution": (_CausalConv, conv_operator, convolution),
}


def outcome(function: Callable[..., Any], arguments: list[Any]) -> list[torch.Tensor]:
    leaves = [t.requires_grad_() for t in arguments if isinstance(t, torch.Tensor) and t.is_floating_point()]
    results = function(*arguments)
    return [*results, *torch.autograd.grad([t.sin().sum() for t in results], leaves)]


@pytest.mark.parametrize("some", [False, True], ids=["without options", "with options"])
@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_function_bit_for_bit(name: str, some: bool) -> None:
    function, operator, arguments = CASES[name]
    for a, b in zip(outcome(operator, arguments(some)), outcome(function.apply, arguments(some)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("some", [False, True], ids=["without options", "with options"])
@pytest.mark.parametrize("name", CASES)
def test_torch_finds_the_operator_sound(name: str, some: bool) -> None:
    """Schema, fake results, registration of the gradient, and tracing with lengths as variables."""
    _, operator, arguments = CASES[name]
    args = arguments(some)
    for t in args:
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.requires_grad_()
    torch.library.opcheck(operator, args)
