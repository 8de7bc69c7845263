"""Attention by the bounds of documents in whole steps: losses and gradients equal those under masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from sleeptrain.config.schema import Config, SleepConfig, TrainConfig
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights, Retained
from sleeptrain.sleep import round_layouts
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.loop import loop_settings, run_rounds
from sleeptrain.sleep.round_layouts import (
    RoundLayouts,
    carried_documents,
    consecutive,
    reads_bounds,
    retained_documents,
    tokens_before,
)
from sleeptrain.sleep.rounds import Round, plan_batch
from sleeptrain.sleep.step import StepResult, forward_backward, step_context
from tests.models import random_batch, tiny_config, tiny_model

WINDOW = 5
LAYERS = ["attention", "gated_deltanet", "sliding_attention", "attention"]
# Two steps of two and a half windows. The first row's document 3 and the second row's go on, the third begins anew; a
# document ends at a boundary, another just after it; rows end and windows begin with pads.
FIRST = [[0] * 3 + [1] * 4 + [2] + [3] * 4, [4] * 12, [PAD] * 4 + [5] * 6 + [6] * 2]
SECOND = [[3] * 5 + [7] * 6 + [PAD], [4] * 7 + [8] * 5, [9] * 3 + [10] * 5 + [PAD] * 4]


def steps(share: float = 1.0) -> list[Batch]:
    return [
        random_batch(FIRST, 1, share, continues=[True, True, False]),
        random_batch(SECOND, 2, share, carried=[True, True, False]),
    ]


def config_of(passes: int, eviction: str, **more: object) -> Config:
    sleep = SleepConfig(window=WINDOW, passes=passes, eviction=eviction, **more)  # type: ignore[arg-type]
    return Config(model=tiny_config(LAYERS), sleep=sleep, train=TrainConfig(tokens=1, micro_batch=2))


def trained(model: Hybrid, config: Config, batches: list[Batch], windows: tuple[int, ...] = (WINDOW, WINDOW)) -> dict:
    """Losses and gradients of steps, and the memory after them."""
    found, state = {}, None
    for step, (batch, window) in enumerate(zip(batches, windows, strict=True)):
        shape = StepShape(config.sleep.passes, window, 3)
        result: StepResult = forward_backward(step_context(config, shape, model), model, batch, shape, state)
        state = result.state
        found[f"loss {step}"] = torch.tensor(result.loss, dtype=torch.float64)
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | gradients | (state.to_state_dict() if state is not None else {})


def both(
    monkeypatch: pytest.MonkeyPatch, config: Config, batches: list[Batch], windows: tuple[int, ...] = (WINDOW, WINDOW)
) -> None:
    found = trained(tiny_model(LAYERS), config, batches, windows)
    with monkeypatch.context() as patch:
        patch.setattr(round_layouts, "reads_bounds", lambda model: False)
        expected = trained(tiny_model(LAYERS), config, batches, windows)
    assert found.keys() == expected.keys() and len(found) > 30
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_steps_equal_those_under_masks(
    by_bounds: list[torch.Tensor],
    eviction: str,
    passes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both(monkeypatch, config_of(passes, eviction), steps())
    assert len(by_bounds) > 10


@pytest.mark.parametrize(
    "more",
    [
        {"when": "unlabelled"},
        {"feedback": "none", "core": [1, 3]},
        {"bptt_windows": 1, "recompute": "block"},
        {"recompute": "window"},
    ],
    ids=str,
)
def test_other_ways_through_a_step(
    by_bounds: list[torch.Tensor],
    more: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both(monkeypatch, config_of(2, "sliding", **more), steps(0.4))
    assert len(by_bounds) > 10


@pytest.mark.parametrize("windows", [(5, 3), (3, 5)])
def test_the_window_may_change_between_steps(
    by_bounds: list[torch.Tensor],
    windows: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both(monkeypatch, config_of(2, "sliding"), steps(), windows)
    assert len(by_bounds) > 10


def test_retained_tokens_get_a_gradient(
    by_bounds: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a window's loss to the keys and values of the memory before it, and none to tokens that nobody sees."""
    model, settings = tiny_model(LAYERS), loop_settings(config_of(1, "sliding").sleep, WINDOW, len(LAYERS))
    first, second = steps()
    with torch.no_grad():
        _, memory = run_rounds(model, first, planned(first), model.empty_state(), settings)
    gradients = []
    for with_bounds in (True, False):
        monkeypatch.setattr(round_layouts, "reads_bounds", lambda model, with_bounds=with_bounds: with_bounds)
        layers = [
            replace(s, k_BLGD=s.k_BLGD.clone().requires_grad_(), v_BLGD=s.v_BLGD.clone().requires_grad_())
            if isinstance(s, Retained)
            else s
            for s in memory.layers
        ]
        leaves = [t for s in layers if isinstance(s, Retained) for t in (s.k_BLGD, s.v_BLGD)]
        losses, _ = run_rounds(model, second, planned(second), FastWeights(tuple(layers)), settings)
        gradients.append(torch.autograd.grad(torch.stack(list(losses.values())).sum(), leaves))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert found[0].any() and not found[2].any(), "the third row carries nothing"


def planned(batch: Batch) -> list[Round]:
    return plan_batch(batch, WINDOW, 1, SleepConfig(window=WINDOW))


def test_documents_that_are_not_consecutive_get_a_mask(by_bounds: list[torch.Tensor]) -> None:
    model, window = tiny_model(["attention"]), Round(0, 0, 4, 1, (0,), loss=True, coda=True)
    for row, runs in [([0, 0, 1, 1], True), ([0, PAD, 1, PAD], True), ([0, PAD, 0, 1], False), ([0, 1, 0, 0], False)]:
        layout = RoundLayouts(random_batch([row]), model).of(window)
        assert (layout.bounds is not None, layout.mask_RLL is None) == (runs, runs)


def test_a_mixer_that_needs_a_mask_gets_it(by_bounds: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    assert reads_bounds(tiny_model(LAYERS)) and reads_bounds(tiny_model(["mamba2"]))
    model = tiny_model(["attention", "mamba2"])
    monkeypatch.setattr(model.blocks[0], "mixer", torch.nn.Identity())
    assert not reads_bounds(model)


def test_a_cpu_needs_masks() -> None:
    assert not reads_bounds(tiny_model(LAYERS))


def test_retained_tokens_that_the_layouts_know(by_bounds: list[torch.Tensor]) -> None:
    batch = random_batch([[0] * 4 + [1] * 6, [2] * 10], carried=[True, False])
    retained = torch.tensor([[7, 0, 0, 0], [2, 2, 2, 2]])
    layouts = RoundLayouts(batch, tiny_model(["attention", "sliding_attention"]), 4, retained)
    wake = Round(0, 0, 4, 1, (0, 1), loss=True, coda=True)
    first = layouts.of(wake)
    assert sorted(first.bounds_after) == [3, 4], "one entry for each number of retained tokens"
    assert first.bounds_after[4].keys.tolist() == [0, 7, 11], "three of the first row; the second is not carried"
    second = layouts.of(replace(wake, window=1, start=4, stop=8))
    assert second.bounds_after[4].keys.tolist() == [0, 4, 12], "document 1 begins there"
    sleep = Round(1, 4, 8, 2, (1,), coda=True)
    assert layouts.of(sleep).bounds_after[4].keys.tolist() == [0, 8]
    assert not layouts.of(replace(sleep, skip=1)).bounds_after, "a pass that skips tokens"
    assert not RoundLayouts(batch, tiny_model(["attention"]), None).of(sleep).bounds_after, "hard eviction"


def test_layouts_of_fixed_sizes(by_bounds: list[torch.Tensor]) -> None:
    """Texts whose documents end elsewhere have tensors of the same sizes, unless they attend to retained tokens."""
    wake, shapes = Round(0, 0, 40, 1, (0,), loss=True, coda=True), set()
    for ends in ([3, 20], [17, 25, 30]):
        starts = torch.zeros(40, dtype=torch.long)
        starts[ends] = 1
        batch = random_batch([starts.cumsum(0).tolist()], carried=[True])
        layout = RoundLayouts(batch, tiny_model(["attention"]), fixed_sizes=True).of(wake)
        assert layout.sizes_are_fixed and layout.segments is not None and layout.bounds is not None
        shapes.add(tuple(t.shape for t in tree_leaves(layout) if isinstance(t, torch.Tensor)))
        after = RoundLayouts(batch, tiny_model(["attention"]), 4, torch.tensor([[7, 0, 0, 0]]), fixed_sizes=True)
        assert not after.of(wake).sizes_are_fixed, "three of four retained tokens take part"
        full = RoundLayouts(batch, tiny_model(["attention"]), 4, torch.tensor([[0, 0, 0, 0]]), fixed_sizes=True)
        assert full.of(wake).sizes_are_fixed and len(full.of(wake).bounds_after[4].keys) == 9
    assert len(shapes) == 1


def test_documents_of_the_layer_that_retains_most() -> None:
    def retained(*documents: int) -> Retained:
        k = torch.zeros(1, len(documents), 1, 1)
        return Retained(k, k, torch.tensor([documents]))

    state = FastWeights((None, retained(1, 2), retained(0, 1, 2), None))
    found = retained_documents(state)
    assert found is not None and found.tolist() == [[0, 1, 2]]
    assert retained_documents(FastWeights((None,))) is None
    later = [Round(1, 4, 8, 1, (0,))]
    assert (
        carried_documents(later, state) is None and carried_documents([replace(later[0], window=0)], state) is not None
    )


def test_tokens_before() -> None:
    ids = torch.tensor([[PAD, 3, 3, 3, 4, PAD], [5, 5, 5, 5, 5, 5]])
    assert tokens_before(ids).tolist() == [[0, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert consecutive(ids) and not consecutive(torch.tensor([[1, PAD, 1]]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_a_gpu_in_bf16_agrees_with_masks_in_fp32(eviction: str) -> None:
    """No attention of a step falls back to torch's unfused one."""
    layers = ["attention", "sliding_attention"]
    model_config = tiny_config(layers)
    model_config.attention.head_dim = 64
    expected, found = (Hybrid(model_config) for _ in range(2))
    expected.init_weights(0)
    found.load_state_dict(expected.state_dict())
    found.to("cuda")
    config = replace(config_of(1, eviction), model=model_config)
    narrow = replace(config, train=replace(config.train, precision="bf16"))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        on_gpu = trained(found, narrow, steps())
    on_cpu = trained(expected, config, steps())
    for name, value in on_cpu.items():
        if name.startswith(("loss", "gradient")):
            error = (on_gpu[name].cpu().float() - value.float()).norm() / value.float().norm()
            assert error <= 5e-2, f"{name}: {float(error):.1e}"
