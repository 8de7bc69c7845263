"""Recomputation changes nothing, and peak memory does not grow with the passes beyond the rounds' borders."""

from __future__ import annotations

import pytest
import torch
from benchmarks.live_bytes import LiveBytes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from sleeptrain.config.schema import AttentionConfig, GatedDeltaNetConfig, ModelConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.linear import computing_in
from sleeptrain.model.state import Boundary
from sleeptrain.model.working_copies import working_copies
from sleeptrain.ops import row_stacks
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.recompute import MODES, Recompute
from sleeptrain.sleep.rounds import plan_rounds, window_facts
from tests.models import random_batch, tiny_model
from tests.sleep.test_loop import ROWS as DOCUMENTS
from tests.sleep.test_loop import assert_same, step, total

WINDOWS, WINDOW, ROWS = 8, 64, 4


@pytest.fixture(scope="module")
def model() -> Hybrid:
    config = ModelConfig(
        vocab_size=64,
        dim=32,
        ffn_dim=256,
        layers=["attention", "gated_deltanet"] * 3,
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=16),
        gated_deltanet=GatedDeltaNetConfig(num_k_heads=1, num_v_heads=1, head_k_dim=8, head_v_dim=16),
    )
    model = Hybrid(config)
    model.init_weights(0)
    return model


def peak_bytes(model: Hybrid, passes: int, mode: str) -> int:
    """The most bytes alive during a forward and backward over all windows, without weights and gradients."""
    shape = (ROWS, WINDOWS * WINDOW)
    tokens = torch.randint(64, shape, generator=torch.Generator().manual_seed(0))
    no = torch.zeros(ROWS, dtype=torch.bool)
    batch = Batch(tokens, tokens, torch.zeros(shape, dtype=torch.long), no, ~no)
    rounds = plan_rounds(window_facts(batch, WINDOW), passes)
    settings = LoopSettings((0, model.num_layers), recompute=Recompute(mode))
    with LiveBytes() as memory:
        losses, _ = run_rounds(model, batch, rounds, model.empty_state(), settings)
        torch.stack(list(losses.values())).sum().backward()
    assert memory.peak > 0
    return memory.peak


def boundary_bytes(model: Hybrid, passes: int) -> int:
    """Features and fast weights at the rounds' borders of one window (two-level recomputation keeps no more)."""
    features = ROWS * WINDOW * model.config.dim * 4
    delta = model.config.gated_deltanet
    states = 3 * ROWS * delta.num_v_heads * delta.head_k_dim * delta.head_v_dim * 4
    return (passes - 1) * (features + states)


@pytest.mark.slow
def test_peak_at_eight_passes_equals_that_of_one(model):
    one, eight = (peak_bytes(model, n, "window") for n in (1, 8))
    assert eight <= 1.15 * one
    # Features and their gradients may exist at the same time at each border.
    assert eight - one <= 3 * boundary_bytes(model, 8)


def test_without_recomputation_it_grows(model):
    assert peak_bytes(model, 4, "none") > 2.5 * peak_bytes(model, 1, "none")


@pytest.mark.parametrize(
    ("mode", "more"),
    [("selective", "none"), ("block", "selective"), ("block", "none"), ("pass", "block"), ("window", "pass")],
)
@pytest.mark.slow
def test_a_pass_costs_less_in_each_mode_than_in_the_one_before(model, mode, more):
    def growth(mode: str) -> int:
        return peak_bytes(model, 4, mode) - peak_bytes(model, 2, mode)

    assert growth(mode) < 0.6 * growth(more)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "none"])
@pytest.mark.parametrize("when", ["every", "unlabelled"])
def test_recomputation_changes_nothing(mode: str, when: str) -> None:
    model = tiny_model()
    batch = random_batch(DOCUMENTS["rows that differ"], target_share=0.4)
    plain, _ = step(model, batch, 4, 3, when)
    again, _ = step(model, batch, 4, 3, when, recompute=mode)
    assert_same(model, total(plain), total(again))


@pytest.mark.parametrize("mode", [m for m in MODES if m != "none"])
@pytest.mark.parametrize("boundary", [Boundary(carry_conv=True), Boundary(sliding_window=4)], ids=["carry", "sliding"])
def test_the_gradients_of_states_are_the_same(mode: str, boundary: Boundary) -> None:
    """Of the memory that a step begins with, where the loss also reads the memory after it."""
    model, batch = tiny_model(), random_batch([[0] * 11] * 2, carried=[True, True], continues=[True, True])
    with torch.no_grad():
        _, state = step(model, batch, 4, 2, boundary=boundary)

    def outcome(mode: str) -> list[torch.Tensor]:
        leaves, structure = tree_flatten(state)
        starts = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in leaves]
        begin = tree_unflatten(starts, structure)
        losses, after = step(model, batch, 4, 3, recompute=mode, boundary=boundary, state=begin)
        read = [t.square().sum() for t in tree_leaves(after) if t is not None and t.is_floating_point()]
        wanted = [t for t in starts if t is not None and t.requires_grad]
        return list(torch.autograd.grad(total(losses) + torch.stack(read).sum(), wanted))

    for found, expected in zip(outcome(mode), outcome("none"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_other_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="'auto' is none of none, selective, block, pass, window"):
        Recompute("auto")


@pytest.mark.parametrize("mode", MODES)
def test_kept_rows_give_the_gradients_of_single_products(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents with sleep in fp64, two micro-batches: products of few rows are computed together or alone."""
    found = []
    for large in (1, 2**40):
        monkeypatch.setattr(row_stacks, "LARGE", large)
        monkeypatch.setattr(row_stacks, "STACKED", 40)
        model, batch = tiny_model(), random_batch(DOCUMENTS["documents inside windows"])
        rounds = plan_rounds(window_facts(batch, 4), 3)
        settings = LoopSettings((0, model.num_layers), recompute=Recompute(mode))
        with computing_in(model, torch.float64), working_copies(model):
            for _ in range(2):
                losses, _ = run_rounds(model, batch, rounds, model.empty_state(), settings)
                torch.stack(list(losses.values())).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[1].items():
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-9, atol=1e-12, msg=name)
