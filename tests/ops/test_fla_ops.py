"""Whole blocks as a GPU runs them, by fake tensors: shapes, dtypes and gradients, without flash-linear-attention."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sleeptrain.data.batch import PAD
from sleeptrain.model.block import Block
from sleeptrain.model.document_layout import DocumentLayout, first_of_document, window_layout
from sleeptrain.model.linear import computing_in
from sleeptrain.model.mixers.registry import mixer_spec
from sleeptrain.model.state import Boundary, LayerState, Recurrent
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.sleep.recompute import Recompute
from tests.models import tiny_config

SHARED = {"rms_norm", "swiglu"}
RULE = SHARED | {"l2norm", "gated_delta_rule", "gated_rms_norm"}
OPERATORS = {
    "attention": SHARED,
    "gated_deltanet": RULE | {"short_convolution"},
    "jet": RULE,  # its dynamic convolution is PyTorch's
    "mamba2": SHARED | {"short_convolution", "gated_linear_attention"},
}


class Operators(TorchDispatchMode):
    """Records the names of the package's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sleeptrain":
            self.called.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _the_package_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    load = importlib.import_module

    def refuse(name: str, package: str | None = None) -> Any:
        assert not name.startswith("fla."), f"{name} was imported"
        return load(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)


def layout(documents: bool) -> DocumentLayout:
    rows = [[0] * 7 + [PAD], [1] * 3 + [2] * 5] if documents else [[0] * 8, [1] * 8]
    ids = torch.tensor(rows)
    return window_layout(ids, first_of_document(ids))


def state_of(kind: str) -> LayerState:
    spec = mixer_spec(tiny_config([kind]), kind)
    if not spec.recurrent:
        return None
    shapes = ((2, *spec.state_shape), (2, 3, sum(spec.conv_pieces)))
    return Recurrent(*(torch.zeros(shape, requires_grad=True) for shape in shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", OPERATORS)
def test_a_block_runs_forward_and_backward(kind: str, documents: bool, dtype: torch.dtype) -> None:
    made, calls = layout(documents), Operators()
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_gpu(), calls:  # the layout is real
        block, state = Block(0, tiny_config([kind])), state_of(kind)
        x = torch.zeros(2, 8, 16, requires_grad=True)
        with computing_in(block, None if dtype == torch.float32 else dtype):
            y, after = block(x, state, made, Boundary(carry_conv=True))
            results, leaves = [y], [x, *block.parameters()]
            if state is not None:
                results += [after.S_BHKV, after.conv_BWD]
                leaves += [state.S_BHKV, state.conv_BWD]
                assert [t.shape for t in results[1:]] == [t.shape for t in leaves[-2:]]
            gradients = torch.autograd.grad([t.float().sum() for t in results], leaves)
        assert (y.shape, y.dtype) == ((2, 8, 16), torch.float32)
        assert [(t.shape, t.dtype) for t in gradients] == [(t.shape, t.dtype) for t in leaves]
    backwards = {f"{name}_backward" for name in OPERATORS[kind]}
    sums = {"add_rms_norm"} if dtype == torch.float32 else set()  # of tensors of one dtype
    assert calls.called == OPERATORS[kind] | backwards | sums


@pytest.mark.parametrize("kind", [kind for kind in OPERATORS if kind != "attention"])
def test_a_pass_for_the_state_alone_needs_no_features(kind: str) -> None:
    with FakeTensorMode(), as_on_gpu():
        block, state = Block(0, tiny_config([kind])), state_of(kind)
        plain = DocumentLayout(torch.zeros(2, 8, dtype=torch.long), None, None, None)
        x = torch.zeros(2, 8, 16, requires_grad=True)
        y, after = block(x, state, plain, Boundary(carry_conv=False), state_only=True)
        assert y is None
        gradients = torch.autograd.grad(after.S_BHKV.sum(), [x, state.S_BHKV])
        assert [t.shape for t in gradients] == [x.shape, state.S_BHKV.shape]


@pytest.mark.parametrize("through", ["features", "state"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_a_block_that_is_run_again_in_the_backward(kind: str, through: str) -> None:
    """A recomputed tensor can be read once: a second look at what an operator has saved would raise."""
    made = layout(True)
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_gpu():
        block, state = Block(0, tiny_config([kind])), state_of(kind)
        x = torch.zeros(2, 8, 16, requires_grad=True)
        y, after = Recompute("pass").round(block, x, state, made, Boundary(carry_conv=True))
        result = y if through == "features" or after is None else after.S_BHKV
        [gradient] = torch.autograd.grad(result.sum(), [x])
        assert gradient.shape == x.shape
