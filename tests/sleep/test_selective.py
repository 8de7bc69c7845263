"""Selective recomputation: what runs again in the backward, and what does not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sleeptrain.sleep.selective import KEPT
from tests.models import random_batch, tiny_model
from tests.sleep.test_loop import step, total


class Operations(TorchDispatchMode):
    """Counts the operations that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def of_backward(mode: str, layers: list[str]) -> Counter[str]:
    """The operations of the backward of a step."""
    losses, _ = step(tiny_model(layers), random_batch([[0] * 12]), 4, 2, recompute=mode)
    loss = total(losses)
    with Operations() as operations:
        loss.backward()
    return operations.counts


@pytest.mark.parametrize("kind", ["attention", "gated_deltanet", "mamba2", "jet"])
def test_products_and_attention_do_not_run_again_and_cheap_operations_do(kind: str) -> None:
    layers = [kind, "gated_deltanet"]
    none, chosen, block = (of_backward(mode, layers) for mode in ("none", "selective", "block"))
    for name in ("aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert chosen[name] == none[name], name
    assert none["aten::mm"] < block["aten::mm"]
    for name in ("aten::linalg_vector_norm", "aten::silu", "aten::rsqrt_"):  # norms, SwiGLU
        assert none[name] < chosen[name] <= block[name], name


def test_a_cpu_runs_recurrences_again() -> None:
    none, chosen = (of_backward(mode, ["gated_deltanet"]) for mode in ("none", "selective"))
    assert none["aten::bmm"] < chosen["aten::bmm"]


def test_names_are_those_of_torch() -> None:
    """An operator of a later torch or of a package that is not loaded may be missing, but none of these."""
    for name in KEPT - {"torch_attn::_varlen_attn"}:
        namespace, operation = name.split("::")
        if namespace == "sleeptrain":
            __import__("sleeptrain.ops.fla_linear_attention")
        assert hasattr(getattr(torch.ops, namespace), operation), name
