from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from sleeptrain.distributed.mesh import Mesh
from sleeptrain.parallel.tensor.collectives import enter
from sleeptrain.parallel.tensor.regions import ColumnLinear, RowLinear, sum_gradient
from tests.parallel.processes import run_ranks


def _gradient_of_an_input_read_transposed() -> torch.Tensor:
    axis = Mesh.build(2, 1).tensor
    x_23 = torch.zeros(2, 3, requires_grad=True)
    (enter(x_23, axis).t() * torch.arange(6.0).view(3, 2) * (axis.rank + 1)).sum().backward()
    return x_23.grad


def test_the_gradient_of_an_input_is_summed_whatever_its_strides():
    for gradient in run_ranks(_gradient_of_an_input_read_transposed, 2):
        assert torch.equal(gradient, 3 * torch.arange(6.0).view(3, 2).t())


def _gradients_around_shared_parameters() -> list[torch.Tensor]:
    axis = Mesh.build(2, 1).tensor
    plain, shared, shared_too, plain_too = (nn.Parameter(torch.zeros(2, 3)) for _ in range(4))
    sum_gradient(shared, axis)
    sum_gradient(shared_too, axis)
    # An addition gives both the same gradient tensor, in either order; only the shared parameter's is summed.
    weight_23 = torch.arange(6.0).view(2, 3) * (axis.rank + 1)
    ((plain + shared) * weight_23 + (shared_too + plain_too) * weight_23).sum().backward()
    (returned,) = torch.autograd.grad((shared * 1.0).sum(), [shared])
    return [plain.grad, plain_too.grad, shared.grad, shared_too.grad, returned]


def test_a_shared_parameter_gets_the_sum_and_its_neighbours_keep_their_own():
    expected = torch.arange(6.0).view(2, 3)
    for rank, gradients in enumerate(run_ranks(_gradients_around_shared_parameters, 2)):
        factors = [rank + 1, rank + 1, 3, 3]
        for gradient, factor in zip(gradients[:4], factors, strict=True):
            assert torch.equal(gradient, factor * expected)
        assert torch.equal(gradients[4], torch.full((2, 3), 2.0)), "torch.autograd.grad is served as backward is"


def _names_and_ungraded_output() -> tuple[list[str], list[str], torch.Tensor]:
    axis = Mesh.build(2, 1).tensor
    column, row = ColumnLinear(3, 2, axis), RowLinear(2, 3, axis)
    for part in (column, row):
        part.load_state_dict({"weight": torch.ones_like(part.weight) * (dist.get_rank() + 1)})
        part.weight.requires_grad_(False)
    x = torch.ones(1, 1, 3)
    return list(column.state_dict()), list(nn.Sequential(row).state_dict()), row(column(x))


def test_linears_have_the_names_of_a_whole_model_and_may_be_frozen():
    for column, row, y in run_ranks(_names_and_ungraded_output, 2):
        assert (column, row) == (["weight"], ["0.weight"])
        # Rank r has columns of 3 (r + 1), and sums two of them with weights (r + 1).
        assert torch.equal(y, torch.full((1, 1, 3), 2 * 3.0 * 1 + 2 * 6.0 * 2))
