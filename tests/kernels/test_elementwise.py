"""Norms and SwiGLU as models call them, and kernels of fla that models may call, against plain PyTorch in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sleeptrain.model.mlp import swiglu
from sleeptrain.model.norm import GatedRMSNorm, RMSNorm, rms_norm, sum_and_norm
from sleeptrain.ops import reference
from tests.kernels.backends import OWN, Backend, parameters
from tests.kernels.comparison import drawn, error, leaves_on

EPS = 1e-6
Within = Callable[..., None]
of_all = pytest.mark.parametrize("backend", parameters(OWN), indirect=True)
in_fp32 = pytest.mark.parametrize("backend", parameters([b for b in OWN if b.dtype == torch.float32]), indirect=True)


def unit(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


@of_all
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 256, 640])
def test_the_gated_norm(backend: Backend, within: Within, dim: int, gate_first: bool) -> None:
    """Norm, then the SiLU gate, is one kernel; in Mamba-2's order the norm alone is. 640: the kernel of long rows."""
    norm = GatedRMSNorm(dim, EPS, gate_first).to(backend.device)

    def run(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor):
        return [torch.func.functional_call(norm, {"weight": weight}, (x, gate))]

    def oracle(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor):
        return [unit(x * F.silu(gate), weight) if gate_first else unit(x, weight) * F.silu(gate)]

    tensors = leaves_on(backend, drawn((2, 7, 3, dim), (2, 7, 3, dim), (dim,)), narrow=2)
    within("gated RMSNorm", error(run, oracle, tensors))


@of_all
@pytest.mark.parametrize("dim", [64, 640])
@pytest.mark.parametrize("kind", ["plain", "zero_centred"])
def test_the_norm(backend: Backend, within: Within, dim: int, kind: str) -> None:
    norm = RMSNorm(dim, EPS, kind).to(backend.device)
    found = error(
        lambda x, weight: [torch.func.functional_call(norm, {"weight": weight}, (x,))],
        lambda x, weight: [unit(x, 1.0 + weight if norm.zero_centred else weight)],
        leaves_on(backend, drawn((2, 7, dim), (dim,)), narrow=1),
    )
    within("RMSNorm", found)


@of_all
def test_the_norm_of_a_slice(backend: Backend, within: Within) -> None:
    """Queries lie beside their gates, head by head."""
    found = error(
        lambda x, weight: [rms_norm(x.chunk(2, dim=-1)[0], weight, EPS)],
        lambda x, weight: [unit(x.chunk(2, dim=-1)[0], weight)],
        leaves_on(backend, drawn((2, 7, 3, 64), (32,)), narrow=1),
    )
    within("RMSNorm", found)


class SumAndNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, EPS, "plain")

    def forward(self, x: torch.Tensor, *y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sum_and_norm(self.norm, x, *y)


@of_all
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dim", [64, 640])
def test_the_norm_of_a_sum_that_goes_on(backend: Backend, within: Within, dim: int, adds: bool) -> None:
    """The gradient of the sum from elsewhere is added in the norm's backward."""
    module = SumAndNorm(dim).to(backend.device)

    def run(x: torch.Tensor, weight: torch.Tensor, *y: torch.Tensor):
        return torch.func.functional_call(module, {"norm.weight": weight}, (x, *y))

    def oracle(x: torch.Tensor, weight: torch.Tensor, *y: torch.Tensor):
        total = sum(y, start=x)
        return total, unit(total, weight)

    shapes = ((2, 7, dim), (dim,), *((2, 7, dim),) * adds)
    leaves = leaves_on(backend, drawn(*shapes), narrow=1)
    leaves = [*leaves[:2], *(y.detach().to(leaves[0].dtype).requires_grad_() for y in leaves[2:])]
    within("RMSNorm of a sum", error(run, oracle, leaves))


@of_all
def test_the_norm_alone_of_a_sum(backend: Backend, within: Within) -> None:
    from fla.modules.norm.layernorm import rms_norm as fla_rms_norm

    found = error(
        lambda x, residual, weight: [fla_rms_norm(x, weight, None, residual=residual, eps=EPS)],
        lambda x, residual, weight: [unit(x + residual, weight)],
        leaves_on(backend, drawn((2, 7, 64), (2, 7, 64), (64,)), narrow=1),
    )
    within("RMSNorm of a sum", found)


@in_fp32
def test_the_sum_without_a_residual_is_the_input_itself(backend: Backend) -> None:
    """What is added in place to the one changes the other."""
    from fla.modules.norm.layernorm import rms_norm as fla_rms_norm

    x, weight = (t.detach() for t in leaves_on(backend, drawn((2, 7, 64), (64,)), narrow=1))
    assert fla_rms_norm(x, weight, None, prenorm=True)[1].data_ptr() == x.data_ptr()


@of_all
@pytest.mark.parametrize("sliced", [False, True])
def test_swiglu(backend: Backend, within: Within, sliced: bool) -> None:
    """sliced: gate and value are halves of one projection's rows, which the kernel reads where they lie."""

    def halves(run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        return lambda x: [run(*x.chunk(2, dim=-1))]

    def plain(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * value

    shape = (2, 9, 80)
    if sliced:
        found = error(halves(swiglu), halves(plain), leaves_on(backend, drawn((2, 9, 160)), narrow=1))
    else:
        tensors = leaves_on(backend, drawn(shape, shape), narrow=2)
        found = error(lambda *x: [swiglu(*x)], lambda *x: [plain(*x)], tensors)
    within("SwiGLU", found)


def decay(a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    return -A_log.exp() * F.softplus(a + dt_bias)


@of_all
@pytest.mark.parametrize("shift", [0.0, -6.0, 25.0], ids=["plain", "slow", "linear"])
def test_the_decay_gate(backend: Backend, within: Within, shift: float) -> None:
    """shift: of dt_bias. -6: the decays of models at their start; 25: where softplus is a straight line."""
    from fla.ops.gated_delta_rule.gate import fused_gdn_gate

    a, A_log, dt_bias = drawn((2, 45, 6), (6,), (6,))
    tensors = leaves_on(backend, [a, A_log, dt_bias + shift], narrow=1)
    found = error(lambda *x: [fused_gdn_gate(*x)], lambda *x: [decay(*x)], tensors)
    within("decay gate", found, factor=3)


@in_fp32
@pytest.mark.xfail(strict=True, reason="log(1 + exp(x)) has no digit left in fp32 below x = -16")
def test_the_decay_gate_where_the_decay_is_tiny(backend: Backend) -> None:
    from fla.ops.gated_delta_rule.gate import fused_gdn_gate

    a = torch.full((1, 4, 2), -17.0, device=backend.device)
    A_log, dt_bias = torch.zeros(2, device=backend.device), torch.zeros(2, device=backend.device)
    expected = decay(a.double(), A_log.double(), dt_bias.double())
    torch.testing.assert_close(fused_gdn_gate(a, A_log, dt_bias).double(), expected, rtol=1e-2, atol=0.0)


@of_all
@pytest.mark.parametrize("with_pads", [False, True])
def test_gates_inside_the_delta_rule(backend: Backend, within: Within, with_pads: bool) -> None:
    """Raw decays and write strengths are given to the recurrence, which applies both gates. At pads both are -inf."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    pad = torch.zeros(1, 70, 1, dtype=torch.bool, device=backend.device)
    pad[:, [3, 4, 66, 69]] = with_pads

    def run(q, k, v, a, b, S, A_log, dt_bias):
        a, b = a.masked_fill(pad, -torch.inf), b.masked_fill(pad, -torch.inf)
        gates = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias, "use_beta_sigmoid_in_kernel": True}
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return chunk_gated_delta_rule(q, k, v, a, b, initial_state=S, **options, **gates)

    def oracle(q, k, v, a, b, S, A_log, dt_bias):
        g, beta = decay(a, A_log, dt_bias).masked_fill(pad, 0.0), b.sigmoid().masked_fill(pad, 0.0)
        return reference.gated_delta_rule(q, k, v, g, beta, initial_state=S, qk_l2norm=True)

    shapes = [(1, 70, 1, 64)] * 2 + [(1, 70, 2, 64)] + [(1, 70, 2)] * 2 + [(1, 2, 64, 64), (2,), (2,)]
    *rest, dt_bias = drawn(*shapes)
    found = error(run, oracle, leaves_on(backend, [*rest, dt_bias - 4.0], narrow=5))
    within("gated delta rule, gates inside", found, factor=3)
