"""Qwen3-Next: projections joined by key head, and only dense models."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.errors import ConfigError
from sleeptrain.hf.families.qwen3_next import Qwen3Next
from tests.hf.models import HYBRID
from tests.models import tiny_config

FAMILY = Qwen3Next()
CONFIG = tiny_config(HYBRID)  # 2 key heads of 8, 4 value heads of 6


def test_experts_are_refused_where_a_layer_has_them() -> None:
    written = FAMILY.to_config(CONFIG)
    assert written["num_experts"] == 0 and written["mlp_only_layers"] == [0, 1, 2]
    assert FAMILY.from_config(written | {"num_experts": 8}).layers == HYBRID, "no layer has them"
    for dense in ([0, 2], None):
        with pytest.raises(ConfigError, match="sleeptrain has no mixture of experts"):
            FAMILY.from_config(written | {"num_experts": 8, "mlp_only_layers": dense})


def test_rows_lie_by_key_head() -> None:
    mappings = {m.theirs[0].removeprefix("model.layers.0.linear_attn."): m for m in FAMILY.mappings(CONFIG)}
    qkv, z = torch.arange(16 + 16 + 24.0)[:, None], torch.arange(100, 124.0)[:, None]
    joint = mappings["in_proj_qkvz.weight"]
    [joined] = joint.to_theirs(qkv, z)
    first = [*range(8), *range(16, 24), *range(32, 44), *range(100, 112)]  # q, k, v and z of the first key head
    assert joined[:40, 0].tolist() == first
    assert all(map(torch.equal, joint.to_ours(joined), (qkv, z)))
    b, a = torch.arange(4.0)[:, None], torch.arange(10, 14.0)[:, None]
    gates = mappings["in_proj_ba.weight"]
    [joined] = gates.to_theirs(b, a)
    assert joined[:, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13]
    assert all(map(torch.equal, gates.to_ours(joined), (b, a)))
