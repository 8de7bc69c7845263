"""A block under torch.compile: one graph without a break, and the values and gradients of an eager call."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.model.block import Block
from sleeptrain.model.document_layout import DocumentLayout, first_of_document, window_layout
from sleeptrain.model.mixers.registry import mixer_spec
from sleeptrain.model.state import Boundary, Recurrent
from tests.kernels.backends import OWN, Backend, parameters
from tests.models import tiny_config

in_fp32 = pytest.mark.parametrize("backend", parameters([b for b in OWN if b.dtype == torch.float32]), indirect=True)


def layout(documents: bool, device: str) -> DocumentLayout:
    ids = torch.tensor([[0] * 8, [1] * 3 + [2] * 5] if documents else [[0] * 8, [1] * 8], device=device)
    return window_layout(ids, first_of_document(ids))


def state_of(kind: str, device: str) -> Recurrent:
    spec = mixer_spec(tiny_config([kind]), kind)
    shapes = ((2, *spec.state_shape), (2, 3, sum(spec.conv_pieces)))
    S, tail = (torch.randn(shape, device=device).requires_grad_() for shape in shapes)
    return Recurrent(S, tail)


@in_fp32
@pytest.mark.parametrize(
    ("kind", "documents"),
    [("gated_deltanet", True), ("mamba2", True), ("jet", False)],
)
def test_it_equals_the_eager_block(backend: Backend, kind: str, documents: bool) -> None:
    torch.manual_seed(0)
    block = Block(0, tiny_config([kind])).to(backend.device)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0.0, 0.3)
    made, state = layout(documents, backend.device), state_of(kind, backend.device)
    x = torch.randn(2, 8, 16, device=backend.device).requires_grad_()

    def outcome(run: torch.nn.Module) -> list[torch.Tensor]:
        y, after = run(x, state, made, Boundary(carry_conv=True))
        results = [y, after.S_BHKV, after.conv_BWD]
        leaves = [x, *block.parameters(), state.S_BHKV, state.conv_BWD]
        return [*results, *torch.autograd.grad([t.sin().sum() for t in results], leaves)]

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for found, expected in zip(outcome(compiled), outcome(block), strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0 if backend.device == "cpu" else 1e-4)
