"""Rows of an embedding: rounded to the compute dtype, with fp32 gradients, however the matrix is stored."""

from __future__ import annotations

import torch

from sleeptrain.model.embedding import Embedding
from sleeptrain.model.linear import computing_in
from sleeptrain.model.working_copies import working_copies

TOKENS = torch.tensor([[3, 1, 3], [0, 3, 3]])


def embedding() -> Embedding:
    torch.manual_seed(0)
    return Embedding(5, 7)


def weights_of_rows() -> torch.Tensor:
    return torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1))


def test_without_a_compute_dtype_it_is_that_of_torch() -> None:
    module = embedding()
    assert torch.equal(module(TOKENS), torch.nn.functional.embedding(TOKENS, module.weight))


def test_rows_are_rounded_and_their_gradients_add_up_in_fp32() -> None:
    module, factor = embedding(), weights_of_rows()
    with computing_in(module, torch.bfloat16):
        rows = module(TOKENS)
    assert rows.dtype == torch.float32 and torch.equal(rows, module.weight.bfloat16().float()[TOKENS])
    (rows * factor).sum().backward()
    expected = torch.zeros(5, 7).index_add(0, TOKENS.flatten(), factor.flatten(0, 1))
    torch.testing.assert_close(module.weight.grad, expected)


def test_the_gradient_of_a_matrix_in_bf16_is_fp32_and_uses_add_to_it() -> None:
    wide, narrow, factor = embedding(), embedding(), weights_of_rows()
    narrow.weight.data = narrow.weight.data.bfloat16()
    narrow.weight.grad_dtype = torch.float32
    for module in (wide, narrow):
        gradient = torch.ones(5, 7)
        module.weight.grad = gradient
        with computing_in(module, torch.bfloat16), working_copies(module):
            assert (module.weight.grad is None) == (module is narrow), "torch.compile refuses it"
            for _ in range(2):
                (module(TOKENS) * factor).sum().backward()
        assert module.weight.grad is gradient and module.gradient is None
    assert torch.equal(wide.weight.grad, narrow.weight.grad)
    assert float((narrow.weight.grad - 1)[3].abs().min()) > 0 and torch.equal(narrow.weight.grad[4], torch.ones(7))
