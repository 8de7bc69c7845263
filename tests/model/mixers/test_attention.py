"""Attention against its definition, one query at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from sleeptrain.model.document_layout import DocumentLayout, window_layout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.rope import rope_tables, rotate
from sleeptrain.model.state import HARD, Boundary, Retained
from sleeptrain.ops.document_attention import after_earlier_keys
from tests.model.test_block import features, run_block
from tests.models import tiny_config, tiny_model
from tests.sleep.oracle import causal_layout


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("qk_norm", ["none", "head", "all"])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_equals_its_definition_query_by_query(gate: bool, qk_norm: str, scale: float) -> None:
    config = tiny_config(["attention"])
    config.attention.gate, config.attention.qk_norm, config.attention.scale = gate, qk_norm, scale
    torch.manual_seed(0)
    model = Hybrid(config).double()
    model.init_weights(0)
    m, c, x = model.blocks[0].mixer, config.attention, torch.randn(1, 7, 16, dtype=torch.float64)
    q = (x[0] @ m.q_proj.weight.T).view(7, 4, -1)
    q, opened = (q[..., :8], torch.sigmoid(q[..., 8:])) if gate else (q, 1.0)
    k, v = ((x[0] @ p.weight.T).view(7, 2, 8) for p in (m.k_proj, m.v_proj))
    if qk_norm != "none":
        axes = (-1,) if qk_norm == "head" else (-2, -1)
        q, k = (t / (t.square().mean(axes, keepdim=True) + config.norm_eps).sqrt() for t in (q, k))
    tables = rope_tables(0, 7, 8, c.partial_rotary_factor, c.rope_theta, x)
    q, k = (rotate(t[None], tables)[0] for t in (q, k))
    expected = torch.empty(7, 4, 8, dtype=torch.float64)
    for t in range(7):
        for head in range(4):
            weights = torch.softmax(k[: t + 1, head // 2] @ q[t, head] * (scale or 8**-0.5), dim=0)
            expected[t, head] = weights @ v[: t + 1, head // 2]
    found, state = m(x, None, causal_layout(7), HARD)
    torch.testing.assert_close(found[0], (expected * opened).flatten(1) @ m.o_proj.weight.T)
    assert state is None


def test_sliding_eviction_keeps_keys_before_rotation() -> None:
    """The last two tokens of a window of three; a shorter window is padded in front."""
    m, x = tiny_model(["attention"]).blocks[0].mixer, features(3)
    none, kept = m(x, None, causal_layout(3), Boundary(sliding_window=2), state_only=True)
    keys = m.k_norm((x @ m.k_proj.weight.T).view(1, 3, 2, 8))
    assert none is None
    torch.testing.assert_close(kept.k_BLGD, keys[:, 1:])
    _, padded = m(x, None, causal_layout(3), Boundary(sliding_window=5))
    assert padded.documents_BL.tolist() == [[-1, -1, 0, 0, 0]]


def test_biases_begin_as_zero_and_count():
    config = tiny_config(["attention"])
    config.attention.qkv_bias = True
    model = Hybrid(config).double()
    model.init_weights(0)
    mixer, x = model.blocks[0].mixer, features()
    assert [not p.any() for n, p in mixer.named_parameters() if n.endswith("bias")] == [True] * 3
    before = run_block(model, x)
    for name in ("q_proj", "k_proj", "v_proj"):
        bias = getattr(mixer, name).bias
        bias.data += torch.randn_like(bias)
        assert not torch.allclose(run_block(model, x), before)
        before = run_block(model, x)


def compiled_case(lengths: list[int], counts: list[int]) -> tuple[DocumentLayout, list[torch.Tensor]]:
    """Two rows of 12 tokens: the first has documents of these lengths. counts: what rows see of 4 retained tokens."""
    generator = torch.Generator().manual_seed(sum(counts) + len(lengths))
    first = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    documents = torch.stack([first, torch.full((12,), 9)])
    layout = window_layout(documents, torch.zeros(2, 12, dtype=torch.bool), with_bounds=True)
    bounds = after_earlier_keys(layout.bounds, torch.tensor(counts), 4)
    shapes = [(2, 12, 16), (2, 4, 2, 8), (2, 4, 2, 8)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    return replace(layout, bounds_after={4: bounds}), leaves


@pytest.mark.parametrize("retains", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_block_reads_bounds_in_one_graph(by_bounds: list[torch.Tensor], retains: bool) -> None:
    """Also where the next windows have other documents, for which one more graph is enough."""
    block, graphs = tiny_model(["attention"]).blocks[0], list[int]()

    def count(module: torch.fx.GraphModule, examples: list[torch.Tensor]) -> object:
        graphs.append(1)
        return aot_eager(module, examples)

    compiled = torch.compile(block, backend=count, fullgraph=True)
    boundary = Boundary(sliding_window=4) if retains else HARD
    for lengths, counts in [([5, 7], [4, 3]), ([2, 4, 6], [1, 4]), ([3] * 4, [4, 0])]:
        layout, leaves = compiled_case(lengths, counts)

        def outcome(run: torch.nn.Module, layout=layout, leaves=leaves) -> list[torch.Tensor]:
            x, k, v = leaves
            state = Retained(k, v, torch.zeros(2, 4, dtype=torch.long)) if retains else None
            y, _ = run(x, state, layout, boundary)
            return [y, *torch.autograd.grad(y.sin().sum(), [*leaves] if retains else [x])]

        for found, expected in zip(outcome(compiled), outcome(block), strict=True):
            torch.testing.assert_close(found, expected)
    assert len(graphs) <= 2 and len(by_bounds) == 6
