"""The recurrences as models call them against the token loop in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from sleeptrain.ops import gated_delta_rule, reference, ssd
from tests.kernels.backends import OWN, RECURRENCES, Backend, parameters
from tests.kernels.comparison import error, leaves_on
from tests.ops.cases import delta_inputs, resets, ssd_inputs

RULE, SSD = "gated delta rule", "SSD (simple_gla)"
Within = Callable[..., None]
Shape = tuple[int, int, int, int, int, int]
of_rule = pytest.mark.parametrize("backend", parameters(RECURRENCES), indirect=True)
of_ssd = pytest.mark.parametrize("backend", parameters(OWN), indirect=True)

of_fp32 = pytest.mark.parametrize("backend", parameters([b for b in OWN if b.dtype == torch.float32]), indirect=True)

SLOW = 0.02  # times the decays of tests/ops/cases.py, so that a state outlives the row


def slow(tensors: Sequence[torch.Tensor], which: int) -> list[torch.Tensor]:
    return [x * SLOW if i == which else x for i, x in enumerate(tensors)]


def cut(backend: Backend, with_resets: bool, B: int, T: int) -> torch.Tensor | None:
    return resets(B, T).to(backend.device) if with_resets else None


def rule_error(
    backend: Backend,
    tensors: Sequence[torch.Tensor],
    reset_BT: torch.Tensor | None = None,
    *,
    qk_l2norm: bool = True,
    through: Sequence[int] | None = None,
) -> float:
    """tensors: q, k, v, g, beta, and the initial state where there is one."""

    def run(*x: torch.Tensor):
        return gated_delta_rule(*x[:5], initial_state=state(x), reset_BT=reset_BT, qk_l2norm=qk_l2norm)

    def oracle(*x: torch.Tensor):
        return reference.gated_delta_rule(*x[:5], initial_state=state(x), reset_BT=reset_BT, qk_l2norm=qk_l2norm)

    return error(run, oracle, leaves_on(backend, tensors, narrow=3), through)


def ssd_error(
    backend: Backend,
    tensors: Sequence[torch.Tensor],
    reset_BT: torch.Tensor | None = None,
    through: Sequence[int] | None = None,
) -> float:
    """tensors: C, B, x, dt, A, and the initial state where there is one."""

    def run(*x: torch.Tensor):
        return ssd(*x[:5], initial_state=state(x), reset_BT=reset_BT)

    def oracle(*x: torch.Tensor):
        return reference.ssd(*x[:5], initial_state=state(x), reset_BT=reset_BT)

    return error(run, oracle, leaves_on(backend, tensors, narrow=3), through)


def state(x: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return x[5] if len(x) > 5 else None


@of_rule
@pytest.mark.parametrize(
    ("shape", "with_resets", "with_state", "fast"),
    [
        ((1, 70, 1, 2, 64, 64), False, True, False),
        ((2, 70, 1, 2, 64, 64), True, True, False),
        ((1, 20, 2, 4, 64, 32), False, True, True),
        ((1, 70, 1, 1, 96, 256), False, True, False),
        ((2, 70, 1, 1, 96, 64), True, False, True),
        ((1, 130, 1, 1, 128, 128), True, True, False),
        ((1, 130, 1, 1, 128, 128), False, True, False),
        ((1, 70, 1, 2, 128, 128), False, False, True),
        ((1, 1, 1, 2, 128, 128), False, True, False),
        ((1, 1, 1, 2, 64, 64), False, False, False),
        ((2, 5, 2, 2, 64, 64), True, True, True),
    ],
    ids=str,
)
def test_the_delta_rule_equals_the_token_loop(
    backend: Backend, within: Within, shape: Shape, with_resets: bool, with_state: bool, fast: bool
) -> None:
    """shape: B, T, key heads, value heads, K, V. fast: decays that forget within a few tokens."""
    tensors = delta_inputs(*shape)[: 6 if with_state else 5]
    reset_BT = cut(backend, with_resets, *shape[:2])
    within(RULE, rule_error(backend, tensors if fast else slow(tensors, 3), reset_BT))


@of_rule
@pytest.mark.parametrize("through", [0, 1], ids=["output", "state"])
def test_the_gradient_of_one_result_alone(backend: Backend, within: Within, through: int) -> None:
    """A window's last pass may leave a state to be trained through, and no output."""
    within(RULE, rule_error(backend, slow(delta_inputs(1, 70, 1, 2, 128, 128), 3), through=[through]))


@of_rule
def test_keys_that_are_given_with_unit_length(backend: Backend, within: Within) -> None:
    within(RULE, rule_error(backend, slow(delta_inputs(1, 40, 1, 2, 128, 128), 3), qk_l2norm=False))


def alike(T: int, K: int, share: float, strongest: float = 1.0) -> list[torch.Tensor]:
    """Keys with a common part, full write strengths and hardly any decay: a window that is read again and again."""
    q, k, v, g, beta, S = (x.detach() for x in delta_inputs(1, T, 1, 1, K, K))
    common = torch.nn.functional.normalize(k[:, :1], dim=-1)
    return [q, share * common + (1 - share) * k, v, 1e-3 * g, strongest * (0.95 + 0.05 * beta), S]


@of_rule
@pytest.mark.parametrize("share", [0.7, 0.99])
def test_keys_that_are_alike(backend: Backend, within: Within, share: float) -> None:
    """Here an inverse by doubling has no correct digit (docs/numerics.md)."""
    within("gated delta rule, keys alike", rule_error(backend, alike(128, 128, share)), factor=5)


@pytest.mark.parametrize("backend", parameters([b for b in OWN if b.dtype != torch.bfloat16]), indirect=True)
def test_keys_that_are_alike_with_negative_eigenvalues(backend: Backend, within: Within) -> None:
    """Write strengths near 2: a token turns around what it finds, so errors do not fade. No promise in bf16."""
    found = rule_error(backend, alike(128, 128, 0.99, strongest=2.0))
    within("gated delta rule, keys alike, b near 2", found, factor=20)


@of_rule
def test_a_window_of_pads_leaves_the_state_exactly_as_it_was(backend: Backend) -> None:
    q, k, v, g, _, S = (x.detach() for x in leaves_on(backend, delta_inputs(1, 70, 1, 2, 128, 128), narrow=3))
    none = torch.zeros_like(g)
    after = gated_delta_rule(q, k, v, none, none, initial_state=S, reset_BT=None, qk_l2norm=True)[1]
    assert torch.equal(after, S)


@of_fp32
def test_keys_of_more_than_256_elements_are_refused(backend: Backend) -> None:
    tensors = (x.detach() for x in leaves_on(backend, delta_inputs(1, 2, 1, 1, 320, 16), narrow=3))
    q, k, v, g, beta, S = tensors
    with pytest.raises(AssertionError, match="head dimension larger than 256"):
        gated_delta_rule(q, k, v, g, beta, initial_state=S, reset_BT=None, qk_l2norm=True)


@of_ssd
@pytest.mark.parametrize(
    ("shape", "with_resets", "with_state", "fast"),
    [
        ((2, 70, 1, 3, 64, 64), True, True, False),
        ((1, 70, 2, 4, 64, 32), False, True, True),
        ((1, 70, 1, 3, 128, 64), False, False, False),
        ((1, 70, 1, 3, 96, 256), False, True, False),
        ((1, 1, 1, 3, 64, 64), False, True, False),
        ((2, 5, 1, 3, 64, 64), True, False, True),
    ],
    ids=str,
)
def test_ssd_equals_the_token_loop(
    backend: Backend, within: Within, shape: Shape, with_resets: bool, with_state: bool, fast: bool
) -> None:
    """shape: B, T, groups, heads, K, V. With one head alone the gradient of A may be the small sum of large numbers."""
    tensors = ssd_inputs(*shape)[: 6 if with_state else 5]
    reset_BT = cut(backend, with_resets, *shape[:2])
    within(SSD, ssd_error(backend, tensors if fast else slow(tensors, 4), reset_BT))


@of_ssd
@pytest.mark.parametrize("through", [0, 1], ids=["output", "state"])
def test_the_gradient_of_one_result_of_ssd(backend: Backend, within: Within, through: int) -> None:
    within(SSD, ssd_error(backend, slow(ssd_inputs(1, 70, 1, 3, 64, 64), 4), through=[through]))


@of_fp32
def test_states_are_fp32_whatever_the_inputs_are(backend: Backend) -> None:
    narrow = torch.float16 if backend.device == "cpu" else torch.bfloat16
    q, k, v, g, beta, S = (x.detach().to(backend.device) for x in delta_inputs(1, 5, 1, 1, 64, 64))
    o, state_after = gated_delta_rule(
        q.to(narrow), k.to(narrow), v.to(narrow), g, beta.float(), initial_state=S, reset_BT=None, qk_l2norm=True
    )
    assert (o.dtype, state_after.dtype) == (narrow, torch.float32)
