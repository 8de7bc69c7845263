"""Kernels of a compiler, against the rule and against torch's own compiler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.model.decay import decay_and_write
from sleeptrain.model.rope import rope_tables, rotate
from sleeptrain.plan.roofline.fusion import Kernel, compiled, eager
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.record import Recorder

X = torch.ones(4, 8)


def kernels(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[Kernel]:
    with torch.no_grad(), Recorder() as recorder:
        result = function(*inputs)
    found = compiled(recorder.calls, recorder.storages([result]))
    assert len(found) <= len(eager(recorder.calls))
    return found


def test_a_chain_is_one_kernel_that_reads_and_writes_once() -> None:
    [kernel] = kernels(lambda x: (x.exp() + x).tanh() * 2, X)
    assert (kernel.kind, kernel.kernels, kernel.bytes) == (Kind.ELEMENTWISE, 1, 2 * 128)


def test_casts_alone_stay_casts() -> None:
    assert [k.kind for k in kernels(lambda x: x.bfloat16(), X)] == [Kind.CAST]
    assert [k.kind for k in kernels(lambda x: x.bfloat16() + 1, X)] == [Kind.ELEMENTWISE]


def test_products_part_kernels_and_their_inputs_are_written() -> None:
    found = kernels(lambda x: (x.exp() @ x.t()).exp(), X)
    assert [k.kind for k in found] == [Kind.ELEMENTWISE, Kind.PRODUCT, Kind.ELEMENTWISE]
    assert found[0].bytes == 2 * 128


def test_no_kernel_runs_before_one_that_it_reads() -> None:
    """exp and its square meet at the end, but a product lies between."""

    def function(x: torch.Tensor) -> torch.Tensor:
        a = x.exp()
        return (a @ X.t() @ X) + a

    assert len(kernels(function, X)) == 4


def test_different_sizes_are_different_kernels() -> None:
    assert len(kernels(lambda x: torch.cat([x.exp(), x[0].exp().expand(1, 8)]), X)) == 3
    assert len(kernels(lambda x: x * x[0].exp(), X)) == 2


def test_a_sum_ends_a_kernel_and_one_over_rows_is_its_own() -> None:
    assert len(kernels(lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), X)) == 3
    assert [k.kernels for k in kernels(lambda x: x.exp().sum(0), X)] == [1, 2]


def test_repeated_and_unread_work_is_not_done() -> None:
    assert len(kernels(lambda x: x.bfloat16() @ (x.bfloat16().t()), X)) == 2

    def unread(x: torch.Tensor) -> torch.Tensor:
        torch.zeros(4).exp()
        return x + torch.zeros(8)

    assert [k.bytes for k in kernels(unread, X)] == [2 * 128]


def test_what_a_backward_reads_is_written() -> None:
    with torch.no_grad(), Recorder() as recorder:
        kept = X.exp()
        result = kept.tanh()
    [alone], [shared] = (compiled(recorder.calls, recorder.storages(used)) for used in ([result], [kept, result]))
    assert shared.bytes == alone.bytes + 128


def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (x.float() * torch.sigmoid(gate.float())).bfloat16()


def norm_and_residual(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x + y
    return z * (z.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def rotary(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    tables = rope_tables(0, 64, 32, 0.5, 1e4, x)
    return rotate(x.view(8, 64, 4, 32), tables) + rotate(y.view(8, 64, 4, 32), tables)


def gates(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    g, beta = decay_and_write(x, y, torch.ones(128), torch.ones(128), None)
    return g * beta


def block(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h = norm_and_residual(x, y).flatten(0, 1)
    weight = torch.ones(128, 128)
    return gated(h @ weight, h @ weight.t()) + F.silu(h).to(torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("function", [gated, norm_and_residual, rotary, gates, block])
def test_torchs_compiler_needs_no_more_kernels(function: Callable[..., torch.Tensor]) -> None:
    """Inductor on a CPU; products are calls outside of its kernels."""
    from torch._inductor import metrics

    inputs = torch.randn(8, 64, 128), torch.randn(8, 64, 128)
    torch._dynamo.reset()
    metrics.reset()
    with torch.no_grad():
        torch.compile(function, fullgraph=True)(*inputs)
    counted = [k for k in kernels(function, *inputs) if k.kind is not Kind.PRODUCT]
    assert 0 < metrics.generated_kernel_count <= len(counted)
