"""The cost of the optimizer's step, and the ranks that pay for it."""

from __future__ import annotations

import pytest

from sleeptrain.optim.optimizers import ParameterRole
from sleeptrain.plan.parameters import Held
from sleeptrain.plan.update import muon_exchange, newton_schulz_flops
from tests.plan.planned import planned, text


def test_the_update_is_shared_by_replicas():
    one, two = (planned(text(), n, "H100").steps[0].speed for n in (1, 2))
    assert one is not None and two is not None and 0.5 < two.update / one.update < 1
    config = text("model.layers=[gated_deltanet]")
    flops = newton_schulz_flops(config, planned(config).held[0], 1)
    c = config.model
    matrices = [(c.dim, c.dim)] * 5 + [(c.dim, c.ffn_dim)] * 3  # q, k, v, z, out; gate, up, down
    assert flops == sum(10 * short * short * (2 * long + short) for short, long in matrices)


def matrices(*names: str) -> list[Held]:
    return [Held(name, 64, (8, 8), ParameterRole("muon")) for name in names]


def test_an_owner_sends_its_matrices_back_to_the_others() -> None:
    config = text("parallel.zero=0")
    assert muon_exchange(config, matrices("a", "b"), 2) == 64, "each owns one, and holds all gradients already"
    assert muon_exchange(config, matrices("a", "b", "c"), 2) == 2 * 64
    assert muon_exchange(config, matrices("a", "b"), 1) == 0


@pytest.mark.parametrize("zero", [1, 3])
def test_missing_parts_of_a_matrix_are_sent_to_its_owner_and_back(zero: int) -> None:
    assert muon_exchange(text(f"parallel.zero={zero}"), matrices("a"), 2) == 32


def test_a_matrix_that_its_owner_holds_is_not_sent() -> None:
    assert muon_exchange(text("parallel.zero=1"), matrices("a", "b"), 2) == 0


def test_without_matrices_nothing_is_exchanged() -> None:
    assert muon_exchange(text(), [Held("norm", 8, (8,), ParameterRole("adamw"))], 2) == 0
