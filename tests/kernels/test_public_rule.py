"""The gated delta rule by the package's public function, as FlashQLA would replace it, against the token loop in fp64.

Models call the parts of it (`sleeptrain/ops/fla_delta_rule.py`), so FlashQLA never runs in them. Whether it could, its
gradients of initial and final states decide: here it is held to what the package's own kernels are held to.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sleeptrain.ops import reference
from sleeptrain.ops.fla_package import from_fla
from tests.kernels.backends import PUBLIC, Backend, parameters
from tests.kernels.comparison import error, leaves_on
from tests.ops.cases import delta_inputs

NAME = "gated delta rule, public function"
K = V = 128  # FlashQLA has no others
Within = Callable[..., None]
of_public = pytest.mark.parametrize("backend", parameters(PUBLIC), indirect=True)


def rule(*x: torch.Tensor, bounds: torch.Tensor | None = None):
    """x: q, k, v, g, beta, the initial states; the norm of queries and keys is inside."""
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True, "cu_seqlens": bounds}
    return from_fla("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")(*x[:5], initial_state=x[5], **options)


def oracle(*x: torch.Tensor):
    return reference.gated_delta_rule(*x[:5], initial_state=x[5], qk_l2norm=True)


@of_public
@pytest.mark.parametrize("through", [None, [0], [1]], ids=["both", "output", "state"])
def test_the_public_rule_equals_the_token_loop(backend: Backend, within: Within, through: list[int] | None) -> None:
    q, k, v, g, beta, S = delta_inputs(1, 130, 1, 2, K, V)
    tensors = leaves_on(backend, [q, k, v, 0.02 * g, beta, S], narrow=3)
    within(NAME, error(rule, oracle, tensors, through))


@of_public
def test_the_public_rule_of_several_documents_in_a_row(backend: Backend, within: Within) -> None:
    lengths = [70, 5, 64]
    q, k, v, g, beta, _ = delta_inputs(1, sum(lengths), 1, 2, K, V)
    states = torch.cat([delta_inputs(1, 1, 1, 2, K, V, seed=i)[5] for i in range(len(lengths))])
    bounds = torch.tensor([0, 70, 75, 139], device=backend.device)

    def one_by_one(*x: torch.Tensor):
        parts = [t.split(lengths, dim=1) for t in x[:5]]
        done = [oracle(*(t[i] for t in parts), x[5][i : i + 1]) for i in range(len(lengths))]
        return torch.cat([o for o, _ in done], dim=1), torch.cat([S for _, S in done])

    tensors = leaves_on(backend, [q, k, v, 0.02 * g, beta, states], narrow=3)
    within(NAME, error(lambda *x: rule(*x, bounds=bounds), one_by_one, tensors))
