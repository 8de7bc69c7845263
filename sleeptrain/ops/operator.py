"""Operators of torch around kernels, with little work for the host at each call.

`torch.library.custom_op` runs several functions of Python at each call, compiled or not: about 70 us, more than most
kernels take. Here a call is torch's dispatcher and the implementation. The gradient is an autograd function around the
operator, which torch.compile traces, so that compiled code calls the operator alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

NAMESPACE = "sleeptrain"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
# {name: operator}, of the modules that are imported.
OPERATORS: dict[str, Operator] = {}


class Operator:
    """The operator `sleeptrain::<name>`, called with positional arguments. Results never share an argument's memory.

    changes: names of the arguments that a call changes in place.
    fake: from the arguments to results of the same shapes, dtypes and strides, without their values.
    """

    def __init__(self, name: str, implementation: Callable[..., Any], changes: Sequence[str] = ()):
        _library.define(name + torch.library.infer_schema(implementation, mutates_args=changes))
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        self.name = name
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.fake: Callable[..., Any] | None = None
        self._with_gradient: type[torch.autograd.Function] | None = None
        OPERATORS[name] = self

    def __call__(self, *args: Any) -> Any:
        if self._with_gradient is None:
            return self.overload(*args)
        return self._with_gradient.apply(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """A decorator of the function that gives results without values."""
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)
        self.fake = fake
        return fake

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """backward, setup_context: as of `torch.autograd.Function`."""
        overload = self.overload
        self._with_gradient = type(
            f"{self.name}_with_gradient",
            (torch.autograd.Function,),
            {
                "forward": staticmethod(lambda *args: overload(*args)),
                "setup_context": staticmethod(setup_context),
                "backward": staticmethod(backward),
            },
        )


def operator(name: str, changes: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator that makes a function of tensors an operator. Its annotations are the schema."""
    return lambda implementation: Operator(name, implementation, changes)
