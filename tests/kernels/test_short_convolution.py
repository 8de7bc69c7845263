"""The short convolution as models call it, by fla's kernel, against a loop over tokens in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.ops import causal_conv
from tests.kernels.backends import OWN, Backend, parameters
from tests.kernels.comparison import drawn, error, leaves_on
from tests.ops.cases import resets

NAME = "short convolution"
Within = Callable[..., None]
of_convolution = pytest.mark.parametrize("backend", parameters(OWN), indirect=True)


def kernel(
    x_BTD: torch.Tensor,
    tail_BWD: torch.Tensor | None,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    reset_BT: torch.Tensor | None = None,
    valid_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    masks = {"reset_BT": reset_BT, "valid_BT": valid_BT}
    return causal_conv(x_BTD, weight_DW, bias_D=bias_D, initial_state=tail_BWD, **masks)


def loop(
    x_BTD: torch.Tensor,
    tail_BWD: torch.Tensor | None,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    reset_BT: torch.Tensor | None = None,
    valid_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, token by token. carried: the last tokens that are no pads."""
    batch, num_tokens, dim = x_BTD.shape
    width = weight_DW.shape[1]
    tail = x_BTD.new_zeros(batch, width - 1, dim) if tail_BWD is None else tail_BWD
    carried, outputs = tail, []
    for t in range(num_tokens):
        x, valid = x_BTD[:, t : t + 1], None if valid_BT is None else valid_BT[:, t, None, None]
        if reset_BT is not None:
            tail, carried = (kept.masked_fill(reset_BT[:, t, None, None], 0.0) for kept in (tail, carried))
        seen = torch.cat([tail, x if valid is None else x * valid], dim=1)
        y = torch.einsum("bwd,dw->bd", seen, weight_DW) + (0.0 if bias_D is None else bias_D)
        outputs.append(F.silu(y))
        tail, after = seen[:, 1:], torch.cat([carried, x], dim=1)[:, 1:]
        carried = after if valid is None else torch.where(valid, after, carried)
    return torch.stack(outputs, dim=1), carried


@of_convolution
@pytest.mark.parametrize(
    ("shape", "with_resets", "with_pads", "with_tail", "with_bias"),
    [
        ((2, 13, 48, 4), False, False, True, True),
        ((2, 130, 48, 4), False, False, True, False),
        ((2, 70, 48, 4), True, False, True, True),
        ((3, 9, 20, 4), True, False, False, False),
        ((2, 70, 48, 4), False, False, False, False),
        ((2, 13, 16, 3), True, False, True, True),
        ((2, 13, 16, 2), False, False, True, False),
        ((2, 13, 16, 5), True, False, True, True),
        ((2, 13, 16, 4), False, True, True, True),
        ((3, 70, 16, 4), True, True, True, True),
        ((3, 9, 16, 3), True, True, False, False),
        *(((2, num_tokens, 16, 4), False, False, True, True) for num_tokens in (1, 2, 3, 4)),
        *(((2, num_tokens, 16, 4), False, True, True, True) for num_tokens in (1, 2)),
    ],
    ids=str,
)
def test_the_convolution_equals_the_loop(
    backend: Backend,
    within: Within,
    shape: tuple[int, int, int, int],
    with_resets: bool,
    with_pads: bool,
    with_tail: bool,
    with_bias: bool,
) -> None:
    """shape: B, T, D, W."""
    B, T, D, W = shape
    x, weight, tail, bias = drawn((B, T, D), (D, W), (B, W - 1, D), (D,))
    reset_BT = resets(B, T).to(backend.device) if with_resets else None
    valid_BT = (torch.arange(B * T).view(B, T) % 3 > 0).to(backend.device) if with_pads else None
    tensors = leaves_on(backend, [x, weight, *([tail] if with_tail else []), *([bias] if with_bias else [])], narrow=1)

    def by(convolution: Callable[..., Sequence[torch.Tensor]]):
        def run(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor):
            tail, bias = rest[0] if with_tail else None, rest[-1] if with_bias else None
            return convolution(x, tail, weight, bias, reset_BT, valid_BT)

        return run

    within(NAME, error(by(kernel), by(loop), tensors))


@of_convolution
@pytest.mark.parametrize("through", [0, 1], ids=["output", "tail"])
def test_the_gradient_of_one_result_of_the_convolution(backend: Backend, within: Within, through: int) -> None:
    tensors = leaves_on(backend, drawn((2, 13, 16), (2, 3, 16), (16, 4)), narrow=1)
    within(NAME, error(kernel, loop, tensors, through=[through]))


@of_convolution
def test_inputs_and_gradients_may_be_slices_of_wider_rows(backend: Backend, within: Within) -> None:
    """A mixer convolves a part of a projection, and splits what comes out."""

    def by(convolution: Callable[..., Sequence[torch.Tensor]]):
        def run(wide: torch.Tensor, weight: torch.Tensor, tail: torch.Tensor):
            y, tail = convolution(wide[..., 8:40], tail, weight)
            return torch.cat([wide, y], dim=-1), tail

        return run

    tensors = leaves_on(backend, drawn((2, 11, 64), (32, 4), (2, 3, 32)), narrow=1)
    within(NAME, error(by(kernel), by(loop), tensors))


@of_convolution
def test_windows_in_a_row_are_one_window(backend: Backend, within: Within) -> None:
    """The gradient of a tail reaches the window before, also through a window that is shorter than the tail."""

    def windows(x: torch.Tensor, weight: torch.Tensor, tail: torch.Tensor):
        outputs = []
        for part in x.split([6, 2, 1, 5], dim=1):
            y, tail = kernel(part, tail, weight)
            outputs.append(y)
        return torch.cat(outputs, dim=1), tail

    tensors = leaves_on(backend, drawn((2, 14, 16), (16, 4), (2, 3, 16)), narrow=1)
    within(NAME, error(windows, lambda x, weight, tail: loop(x, tail, weight), tensors))


@pytest.mark.parametrize("backend", parameters([b for b in OWN if b.dtype == torch.float32]), indirect=True)
@pytest.mark.xfail(strict=True, reason="the kernel's backward skips slot 0 of the returned cache; no tap reads it")
def test_slot_0_of_the_cache_has_no_gradient(backend: Backend) -> None:
    from fla.modules.causal_conv1d import causal_conv1d

    x, weight = leaves_on(backend, drawn((1, 6, 16), (16, 4)), narrow=2)
    _, cache = causal_conv1d(x, weight, output_final_state=True)
    assert torch.autograd.grad(cache[..., 0].sum(), x)[0].any(), "slot 0 is a copy of the token 4 before the end"


@of_convolution
def test_the_tail_is_as_wide_as_the_weight(backend: Backend) -> None:
    """The kernel's cache has the dtype of x; its entries are inputs of this or an earlier window, so that is exact."""
    x, weight, tail = leaves_on(backend, drawn((1, 2, 16), (16, 4), (1, 3, 16)), narrow=1)
    tail = tail.detach().to(backend.dtype).float()
    found = kernel(x, tail, weight)[1]
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.cat([tail, x], dim=1)[:, -3:])


@of_convolution
def test_one_token_without_a_gradient_is_written_into_the_cache(backend: Backend, within: Within) -> None:
    """The function for decoding differs from the others: it changes the cache that it is given."""
    from fla.modules.causal_conv1d import causal_conv1d_update

    x, weight, tail, bias = (
        t.detach() for t in leaves_on(backend, drawn((2, 1, 16), (16, 4), (2, 3, 16), (16,)), narrow=1)
    )
    cache = F.pad(tail.transpose(1, 2), (1, 0)).contiguous()
    y, returned = causal_conv1d_update(x, cache, weight=weight, bias=bias, activation="silu")
    expected = loop(x.double(), tail.double(), weight.double(), bias.double())
    assert returned.data_ptr() == cache.data_ptr()
    found = max((a - b).abs().max().item() for a, b in zip((y, cache[..., 1:].transpose(1, 2)), expected, strict=True))
    within("short convolution, one token", found)
