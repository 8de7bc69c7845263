"""Operators of which the count knows the cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.varlen  # registers its operators
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.ops import fla_conv, fla_cross_entropy, fla_delta_rule, fla_elementwise, fla_linear_attention
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.opaque import OPAQUE, Documents
from sleeptrain.plan.roofline.record import Recorder
from sleeptrain.plan.roofline.recurrence_times import DELTA_RULE, DELTA_RULE_BACKWARD

# They register their operators when they are imported.
REGISTERED = (fla_conv, fla_cross_entropy, fla_delta_rule, fla_elementwise, fla_linear_attention)


@pytest.mark.parametrize("name", OPAQUE)
def test_torch_knows_the_operator(name: str) -> None:
    namespace, _, packet = name.partition("::")
    assert getattr(getattr(torch.ops, namespace), packet).overloads()


def test_no_operator_around_kernels_is_missing() -> None:
    """The operators around a CPU's recurrences are none of a GPU; a product is counted as torch's are."""
    found = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("sleeptrain::")}
    others = ("sleeptrain::chunked_", "sleeptrain::causal_conv_in_slabs", "sleeptrain::add_wide_products")
    assert {name for name in found if not name.startswith(others)} == {
        name for name in OPAQUE if name.startswith("sleeptrain::")
    }


def test_attention_costs_the_pairs_that_attend() -> None:
    with FakeTensorMode(), Recorder(documents=Documents(7)) as recorder:
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


def test_the_delta_rule_takes_the_time_of_its_chunks_and_tokens() -> None:
    forward, backward = (OPAQUE[f"sleeptrain::gated_delta_rule{end}"] for end in ("", "_backward"))
    x = torch.empty(1, 2048, 16, 128)
    cost = forward([x, x, x, None, None, None, None, None, 1.0], {}, Documents())
    assert (cost.kernels, cost.h200) == (9, DELTA_RULE.seconds(1, 32, 2048, 16))
    assert backward([x, None, x, x, x], {}, Documents()).h200 == DELTA_RULE_BACKWARD.seconds(1, 32, 2048, 16)
    bounds, chunk_indices = torch.zeros(4), torch.zeros(34, 2)
    cut = forward([x, x, x, None, None, None, bounds, chunk_indices, 1.0], {}, Documents())
    assert cut.h200 == DELTA_RULE.seconds(1, 34, 2048, 16), "documents have chunks of their own"
    padded = forward([x, x, x, None, None, None, bounds, chunk_indices, 1.0], {}, Documents(chunks=33))
    assert padded.h200 == DELTA_RULE.seconds(1, 33, 2048, 16), "empty chunks take no time"
