"""What a step keeps of weights, against a step that computes it at each use."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.model import working_copies as module
from sleeptrain.model.decay import KeepsDecayWide
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.linear import computing_in
from sleeptrain.model.working_copies import working_copies
from tests.models import tiny_config
from tests.sleep.oracle import causal_layout

BF16 = torch.bfloat16


def gradients(late: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor | None], torch.Tensor]:
    """The gradients of three uses in two backwards, and the tensor that the last norm's gradient had before."""
    model = Hybrid(tiny_config())
    model.init_weights(0)
    norm = model.get_parameter("norm.weight")
    norm.grad = before = torch.full_like(norm, 0.25)
    unused = next(iter(model.blocks.values())).mixer_norm  # type: ignore[union-attr]
    tokens = torch.arange(12).view(2, 6)
    with monkeypatch.context() as patch:
        if not late:
            patch.setattr(module, "_is_summed_late", lambda p: False)
        with computing_in(model, BF16), working_copies(model):
            for uses in (1, 2):
                x, state = model.embed(tokens), model.empty_state()
                for _ in range(uses):
                    x, state = model.run(x, state, causal_layout(6), first=1)
                    assert x is not None
                model.cross_entropy(x.flatten(0, 1), tokens.flatten()).backward()
            assert late == (norm.grad is None)
    assert unused.weight.grad is None
    return {name: p.grad for name, p in model.named_parameters()}, before


def test_late_sums_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same order, in the tensor that was there, and of a parameter that nothing uses none."""
    (found, before), (expected, _) = gradients(True, monkeypatch), gradients(False, monkeypatch)
    assert found["norm.weight"] is before and not torch.equal(before, torch.full_like(before, 0.25))
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(gradient, found[name]), name


def test_a_step_adds_to_vectors_with_few_operations() -> None:
    model = Hybrid(tiny_config())
    with computing_in(model, BF16), working_copies(model):
        small = [p for p in model.parameters() if module.is_hooked(p)]
    assert len(small) > 5 and not any(module.is_hooked(p) for p in model.parameters())
    assert all(p.grad is None for p in small)


def test_a_known_scale_has_the_gradient_of_the_weight() -> None:
    model = Hybrid(tiny_config())
    model.init_weights(0)
    norm, x = model.norm, torch.randn(3, model.config.dim)
    assert norm is not None
    norm.weight.data.normal_()
    expected, (expected_gradient,) = (y := norm(x)), torch.autograd.grad(y.square().sum(), norm.weight)
    with computing_in(model, BF16), working_copies(model):
        scale, found = norm.scale, norm(x)
        assert scale is not None and torch.equal(scale, 1 + norm.weight)
        found.square().sum().backward()
    assert torch.equal(found, expected) and torch.equal(norm.weight.grad, expected_gradient) and norm.scale is None


def test_a_known_decay_is_that_of_the_weight() -> None:
    model = Hybrid(tiny_config())
    model.init_weights(0)
    [mixer, *_] = [m for m in model.modules() if isinstance(m, KeepsDecayWide)]
    with computing_in(model, BF16), working_copies(model):
        assert mixer.rate is not None and torch.equal(mixer.rate, -mixer.A_log.exp())
    assert mixer.rate is None
