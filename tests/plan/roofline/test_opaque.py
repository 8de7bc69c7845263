"""Operators of which the count knows the cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.varlen  # registers its operators
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.ops import fla_conv, fla_cross_entropy, fla_delta_rule, fla_elementwise, fla_linear_attention
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.opaque import OPAQUE
from sleeptrain.plan.roofline.record import Recorder

# They register their operators when they are imported.
REGISTERED = (fla_conv, fla_cross_entropy, fla_delta_rule, fla_elementwise, fla_linear_attention)


@pytest.mark.parametrize("name", OPAQUE)
def test_torch_knows_the_operator(name: str) -> None:
    namespace, _, packet = name.partition("::")
    assert getattr(getattr(torch.ops, namespace), packet).overloads()


def test_no_operator_around_kernels_is_missing() -> None:
    """The operators around a CPU's recurrences are none of a GPU; a product is counted as torch's are."""
    found = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("sleeptrain::")}
    others = ("sleeptrain::chunked_", "sleeptrain::causal_conv_in_slabs", "sleeptrain::add_wide_product")
    assert {name for name in found if not name.startswith(others)} == {
        name for name in OPAQUE if name.startswith("sleeptrain::")
    }


def test_attention_costs_the_pairs_that_attend() -> None:
    with FakeTensorMode(), Recorder(pairs=7) as recorder:
        q, k = torch.empty(2, 4, 100, 64), torch.empty(2, 2, 100, 64)
        F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        F.scaled_dot_product_attention(q, k, k, attn_mask=torch.ones(100, 100), enable_gqa=True)
        bounds = torch.zeros(3, dtype=torch.int32)
        rows = torch.empty(100, 4, 64, dtype=torch.bfloat16)
        torch.ops.torch_attn._varlen_attn(rows, rows, rows, bounds, bounds, 60, 60, True)
    causal, masked, varlen = [c for c in recorder.calls if c.kind is Kind.ATTENTION]
    assert causal.flops == 4 * 4 * 64 * 2 * 100 * 101 // 2 and causal.kernels == 1
    assert masked.flops == 4 * 4 * 64 * 2 * 100**2 and masked.kernels > 1 and masked.h200 > 0
    assert varlen.flops == 4 * 4 * 64 * 7


def test_the_published_time_of_the_delta_rule_is_that_of_its_shape() -> None:
    k, v = torch.empty(1, 2048, 16, 128), torch.empty(1, 2048, 16, 128)
    forward, backward = (OPAQUE[f"sleeptrain::gated_delta_rule{end}"] for end in ("", "_backward"))
    cost = forward([k, k, v], {}, 0)
    assert (cost.kernels, cost.h200) == (9, 0.102e-3)
    assert backward([v, None, k, k, v], {}, 0).h200 == 3 * cost.h200
    longer = torch.empty(1, 8192, 16, 128)
    assert cost.h200 < forward([longer, longer, longer], {}, 0).h200 < 4 * cost.h200
