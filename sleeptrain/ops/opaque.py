"""Autograd functions as operators of torch, which torch.compile calls instead of tracing their loops.

A chunked recurrence loops over its slabs: traced, each length would give another graph of thousands of nodes. As an
operator it is one node for all lengths. Its backward runs the forward again, so only its arguments are saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


class _Context:
    """What an autograd function's forward leaves for its backward, in a call outside autograd."""

    saved_tensors: tuple[torch.Tensor | None, ...] = ()

    def __init__(self, arguments: tuple[Any, ...]):
        self.needs_input_grad = tuple(map(_has_gradient, arguments))

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors


def as_operator(
    function: type[torch.autograd.Function], name: str, arguments: str, fake: Callable[..., Pair]
) -> Callable[..., Pair]:
    """`function` as the operator `sleeptrain::<name>`, with the same values and gradients, bit for bit.

    function: from tensors and options to two tensors, both differentiable, once; its context gets no attribute but
    those it sets, `save_for_backward` and `needs_input_grad`. arguments: in the schema language of torch, `Tensor x,
    bool flag`; every tensor of a floating dtype has a gradient. fake: from the arguments to two contiguous tensors of
    the results' shapes and dtypes, without their values.
    """

    def forward(*args: Any) -> Pair:
        first, second = function.forward(_Context(args), *args)
        return first.contiguous(), second.contiguous()

    def backward(d_first: torch.Tensor, d_second: torch.Tensor, *args: Any) -> list[torch.Tensor]:
        context = _Context(args)
        function.forward(context, *args)
        gradients = function.backward(context, d_first.contiguous(), d_second.contiguous())
        # A gradient may be a slice of another one's memory: results of an operator may not.
        return [
            gradient.clone(memory_format=torch.contiguous_format)
            for gradient, needed in zip(gradients, context.needs_input_grad, strict=True)
            if needed
        ]

    def fake_backward(d_first: torch.Tensor, d_second: torch.Tensor, *args: Any) -> list[torch.Tensor]:
        return [t.new_empty(t.shape) for t in args if _has_gradient(t)]

    operator = torch.library.custom_op(
        f"sleeptrain::{name}", forward, mutates_args=(), schema=f"({arguments}) -> (Tensor, Tensor)"
    )
    operator.register_fake(fake)
    gradient = torch.library.custom_op(
        f"sleeptrain::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor d_first, Tensor d_second, {arguments}) -> Tensor[]",
    )
    gradient.register_fake(fake_backward)
    operator.register_autograd(_backward_by(gradient), setup_context=_save)
    return operator


def _has_gradient(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.is_floating_point()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    ctx.save_for_backward(*(t for t in inputs if isinstance(t, torch.Tensor)))
    ctx.arguments = tuple(None if isinstance(t, torch.Tensor) else (t,) for t in inputs)


def _backward_by(gradient: Callable[..., list[torch.Tensor]]) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    def backward(ctx: Any, d_first: torch.Tensor, d_second: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        args = [next(tensors) if option is None else option[0] for option in ctx.arguments]
        gradients = iter(gradient(d_first, d_second, *args))
        return tuple(next(gradients) if _has_gradient(t) else None for t in args)

    return backward
