"""The FLOP count against the products that torch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sleeptrain.model.mixers.gated_deltanet as gated_deltanet
import sleeptrain.model.mixers.jet as jet
import sleeptrain.model.mixers.mamba2 as mamba2
from sleeptrain.data.batch import PAD
from sleeptrain.model.document_layout import first_of_document, sleep_layout, window_layout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.flops import layer_flops, round_flops, step_flops
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.rounds import Round, WindowFacts, plan_rounds, window_facts
from sleeptrain.sleep.step import forward_backward, step_context
from tests.models import VOCABULARY, random_batch, tiny_config
from tests.sleep.test_step import config


@pytest.fixture
def free_recurrences(monkeypatch):
    """Recurrences without products, because implementations differ in their number of products."""

    def rule(q, k, v, g, beta, *, initial_state=None, **_):
        S = torch.zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) + 0 * v.sum()
        return v + 0 * (q.sum() + k.sum() + g.sum() + beta.sum()), S

    def ssd(C, B, x, dt, A, *, initial_state=None, **_):
        S = torch.zeros(x.shape[0], x.shape[2], B.shape[-1], x.shape[-1]) + 0 * x.sum()
        return x + 0 * (C.sum() + B.sum() + dt.sum() + A.sum()), S

    def conv(x, weight, *, bias_D=None, initial_state=None, **_):
        return x * weight.sum(), x[:, :3]

    def dynamic_conv(x, kernel, **_):
        return x * kernel.sum(2), x[:, :3]

    for module in (gated_deltanet, mamba2):
        monkeypatch.setattr(module, "causal_conv", conv)
    monkeypatch.setattr(jet, "dynamic_causal_conv", dynamic_conv)
    for module in (gated_deltanet, jet):
        monkeypatch.setattr(module, "gated_delta_rule", rule)
    monkeypatch.setattr(mamba2, "ssd", ssd)


def recurrence_flops(layers, num_tokens):
    c = tiny_config()
    per_token = {
        "attention": 0,
        "gated_deltanet": 6 * c.gated_deltanet.num_v_heads * c.gated_deltanet.head_k_dim * c.gated_deltanet.head_v_dim,
        "jet": 6 * c.jet.num_heads * c.jet.head_k_dim * c.jet.head_v_dim,
        "mamba2": 4 * c.mamba2.num_heads * c.mamba2.state_dim * c.mamba2.head_dim,
    }
    return sum(per_token[kind] for kind in layers) * num_tokens


LAYERS = [["attention"], ["gated_deltanet"], ["jet"], ["mamba2"], ["attention", "gated_deltanet"] * 2]


def counted_and_expected(layers: list[str], passes: int, backward: bool) -> tuple[int, int]:
    """The count of torch, plus the work of the recurrences, and our count, for one window of some passes."""
    length, rows, core = 8, 2, (0, len(layers))
    model = Hybrid(tiny_config(layers))
    batch = random_batch([[0] * length] * rows)
    rounds = plan_rounds(window_facts(batch, length), 1)
    # A plan has no sleep pass without a reader; these read each other.
    rounds += [Round(0, 0, length, n, (0, 1), feeds_back=True) for n in range(2, passes + 1)]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses, _ = run_rounds(model, batch, rounds, model.empty_state(), LoopSettings(core))
        if backward:
            losses[0].backward()
    counted = counter.get_total_flops() + recurrence_flops(layers, length * rows) * passes * (3 if backward else 1)
    # torch counts every pair of a causal window, we count the pairs that attend.
    masked = (length * length - length * (length + 1) // 2) * rows
    masked *= sum(layer_flops(model.config, layer).pair for layer in range(len(layers)))
    forward = sum(round_flops(model.config, r, core) + masked for r in rounds)
    num_targets = rows * (length - 1)
    if backward:
        return counted, step_flops(model.config, rounds, num_targets, core) + 3 * masked * passes
    return counted, forward + 2 * model.config.dim * VOCABULARY * num_targets


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("passes", [1, 3])
def test_forward_equals_the_counted_products(layers, passes, free_recurrences):
    counted, expected = counted_and_expected(layers, passes, backward=False)
    assert counted == expected


@pytest.mark.parametrize("layers", LAYERS)
def test_a_step_equals_the_counted_products(layers, free_recurrences):
    counted, expected = counted_and_expected(layers, 1, backward=True)
    assert counted == expected


def test_a_sleep_round_costs_less_when_only_its_state_counts():
    config = tiny_config(["attention", "gated_deltanet", "attention"])
    full = Round(0, 0, 8, 2, (0,), feeds_back=True)
    last = Round(0, 0, 8, 2, (0,), feeds_back=True, coda=True, state_only=True)
    per_layer = [layer_flops(config, layer) for layer in range(3)]
    attention = (per_layer[0].state + per_layer[0].features) * 8 + per_layer[0].pair * 36
    assert round_flops(config, last, (0, 3)) == attention + per_layer[1].state * 8
    assert round_flops(config, full, (0, 3)) == 2 * attention + (per_layer[1].state + per_layer[1].features) * 8


def test_rounds_outside_the_core_are_not_counted():
    config = tiny_config(["gated_deltanet"] * 3)
    layer = layer_flops(config, 0)
    per_layer = (layer.state + layer.features) * 8
    sleeping = Round(0, 0, 8, 2, (0, 1), feeds_back=True)
    assert round_flops(config, sleeping, (1, 2)) == per_layer * 2
    assert round_flops(config, Round(0, 0, 8, 1, (0,), loss=True, coda=True), (1, 2)) == 3 * per_layer


@pytest.mark.parametrize("bptt_passes, with_backward", [(1, [3]), (2, [2, 3]), (3, [1, 2, 3])])
def test_the_core_has_no_backward_before_a_detached_pass(bptt_passes: int, with_backward: list[int]):
    """The blocks before the core, and rows that predict in the wake pass, keep theirs."""
    config, core = tiny_config(["gated_deltanet"] * 3), (1, 3)
    facts = [
        WindowFacts(0, 8, has_target=(False, True), read_later=(True, True)),
        WindowFacts(8, 16, has_target=(True, True), read_later=(False, False)),
    ]
    rounds = plan_rounds(facts, 3, bptt_passes=bptt_passes)
    expected = 0
    for r in rounds:
        trained = r.loss or r.pass_index in with_backward
        before_core = round_flops(config, r, core, only=range(1))
        expected += 3 * before_core + (3 if trained else 1) * (round_flops(config, r, core) - before_core)
    assert step_flops(config, rounds, 0, core) == expected


def test_sliding_eviction_counts_the_pairs_across_the_border():
    config = tiny_config(["attention"])
    cost = layer_flops(config, 0)
    first, second = (Round(w, 8 * w, 8 * w + 8, 1, (0,), loss=True, coda=True) for w in (0, 1))
    base = (cost.state + cost.features) * 8
    assert round_flops(config, first, (0, 1), 8) == base + cost.pair * 36
    assert round_flops(config, second, (0, 1), 8) == base + cost.pair * 64


@pytest.mark.parametrize("sliding_window", [None, 8, 3])
@pytest.mark.parametrize("reach", [1, 5, 8, 20])
def test_a_sliding_layer_counts_the_pairs_it_sees(reach: int, sliding_window: int | None):
    config = tiny_config(["sliding_attention"])
    config.attention.sliding_window = reach
    cost = layer_flops(config, 0)
    assert cost == layer_flops(tiny_config(["attention"]), 0)
    for window in (0, 1):
        found = round_flops(
            config, Round(window, 8 * window, 8 * window + 8, 1, (0,), loss=True), (0, 1), sliding_window
        )
        first = 8 * window if sliding_window is None else 0
        far = min(reach, sliding_window or reach)
        pairs = sum(first <= k <= q and q - k < far for q in range(8 * window, 8 * window + 8) for k in range(16))
        assert found == (cost.state + cost.features) * 8 + cost.pair * pairs


DOCUMENTS = [[0] * 16, [0] * 3 + [1] * 2 + [2] * 11, [0] * 6 + [PAD] * 10, [0] * 5 + [1] * 7 + [PAD] * 4]


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("reach", [2, 100])
def test_only_tokens_and_pairs_that_a_layout_admits_are_counted(reach: int, sliding_window: int | None) -> None:
    """Tokens and pairs are counted in the masks that the mixers get."""
    config = tiny_config(["sliding_attention"])
    config.attention.sliding_window = reach
    batch, cost = random_batch(DOCUMENTS, continues=[True] * 4), layer_flops(config, 0)
    starts, documents = first_of_document(batch.documents_BT), batch.documents_BT
    rounds = plan_rounds(window_facts(batch, 4), 3)
    assert {r.pass_index for r in rounds} == {1, 2, 3}
    for r in rounds:
        rows = list(r.rows)
        own, before = documents[rows, r.start : r.stop], documents[rows, max(r.start - 4, 0) : r.start]
        layout = window_layout(own, starts[rows, r.start : r.stop]) if r.is_wake else sleep_layout(own)
        valid = layout.documents_RL != PAD
        near = layout.within(reach)
        if sliding_window is not None and r.window > 0:
            mask = near.with_retained(before, min(sliding_window, reach))
        else:
            mask = torch.ones(len(rows), 1, 4, 4, dtype=torch.bool).tril() if near.mask_RLL is None else near.mask_RLL
        pairs = int((mask & valid[:, None, :, None]).sum())
        every = replace(r, state_only=False)
        expected = (cost.state + cost.features) * int(valid.sum()) + cost.pair * pairs
        assert round_flops(config, every, (0, 1), sliding_window) == expected


@pytest.mark.parametrize("layers", LAYERS)
def test_pads_cost_nothing_whatever_the_layout(layers: list[str]) -> None:
    """A step of padded rows has the FLOPs of rows that end where their documents end."""
    settings = config(model__layers=layers)
    model = Hybrid(settings.model)
    model.init_weights(0)

    def flops(*rows: list[int]) -> int:
        shape = StepShape(3, 4, len(rows))
        context = step_context(settings, shape, model)
        return forward_backward(context, model, random_batch(list(rows)), shape, None).flops

    assert flops([0] * 6 + [PAD] * 6, [0] * 12) == flops([0] * 6) + flops([0] * 12)


def test_a_mixer_alone_costs_no_feed_forward():
    config = tiny_config(["jet", "jet"], mixer_only=[1])
    both, alone = layer_flops(config, 0), layer_flops(config, 1)
    assert (both.state, both.features - alone.features) == (alone.state, 6 * config.dim * config.ffn_dim)
