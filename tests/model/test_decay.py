"""Decay parameters: they are fp32, and a fresh model remembers a window."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.model.decay import decay_and_write, parameter_generator, random_decay
from sleeptrain.model.hybrid import Hybrid
from tests.models import tiny_config

LAYERS = ["attention", "gated_deltanet", "mamba2"]


def test_pads_neither_decay_nor_write() -> None:
    a, b = (torch.full((1, 2, 3), value) for value in (0.5, -1.0))
    valid = torch.tensor([[True, False]])
    g, beta = decay_and_write(a, b, torch.tensor([0.0, 1.0, 2.0]), torch.ones(3), valid, strongest=2.0)
    torch.testing.assert_close(g[0, 0], -torch.tensor([0.0, 1.0, 2.0]).exp() * F.softplus(torch.tensor(1.5)))
    torch.testing.assert_close(beta[0, 0], torch.full((3,), 2 * torch.sigmoid(torch.tensor(-1.0)).item()))
    assert not g[0, 1].any() and not beta[0, 1].any()


def test_a_known_rate_has_the_gradient_of_its_logarithm() -> None:
    a, b, A_log, dt_bias = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 3, 4), (2, 3, 4), 4, 4))
    outcomes = []
    for rate in (None, -A_log.detach().exp()):
        g, _ = decay_and_write(a, b, A_log, dt_bias, None, rate=rate)
        outcomes.append([g, *torch.autograd.grad(g.sin().sum(), (a, A_log, dt_bias))])
    torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_decay_and_write_are_wide(dtype: torch.dtype, wide: torch.dtype) -> None:
    a = torch.ones(1, 1, 1, dtype=dtype)
    assert {t.dtype for t in decay_and_write(a, a, torch.zeros(1), torch.zeros(1), None)} == {wide}


def test_first_decays_are_those_of_mamba() -> None:
    drawn = random_decay((1000,), torch.Generator().manual_seed(0))
    A, dt = drawn["A_log"].exp(), F.softplus(drawn["dt_bias"])
    assert A.min() > 0 and A.max() < 16 and A.mean() == pytest.approx(8, abs=0.5)
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101 and dt.log().mean().exp() == pytest.approx(1e-2, rel=0.1)


def test_a_generator_belongs_to_a_seed_and_a_name() -> None:
    keys = [(0, "a"), (1, "a"), (0, "b"), (2**40, "a"), (0, "a")]
    first, *others, again = (torch.rand(1, generator=parameter_generator(*key)).item() for key in keys)
    assert first == again and len({first, *others}) == 4


def test_decays_stay_fp32_when_the_model_is_cast():
    model = Hybrid(tiny_config(LAYERS))
    model.init_weights(0)
    before = model.blocks[1].mixer.A_log.clone()
    model.bfloat16()
    assert model.blocks[0].mixer.q_proj.weight.dtype == torch.bfloat16
    for mixer in (model.blocks[1].mixer, model.blocks[2].mixer):
        assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert torch.equal(model.blocks[1].mixer.A_log, before)
    assert model.double().blocks[1].mixer.A_log.dtype == torch.float64


def test_a_fresh_model_remembers_a_window():
    """Half of the heads keep more than a tenth of their state over 64 tokens; with dt_bias = 1 none keeps 1e-6."""
    model = Hybrid(tiny_config(["gated_deltanet"] * 8))
    model.init_weights(0)
    rates = torch.stack([-m.A_log.exp() * F.softplus(m.dt_bias) for m in (b.mixer for b in model.blocks.values())])
    kept = (64 * rates).exp()
    assert (kept > 0.1).float().mean() > 0.3
    assert (-64 * 8 * F.softplus(torch.tensor(1.0))).exp() < 1e-6
