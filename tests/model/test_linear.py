"""Linear layers with a compute dtype: against autocast that casts each use, and in what they keep and leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from sleeptrain.model.embedding import Embedding
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.linear import Linear, adopt_linears, computing_in, products_of
from sleeptrain.model.working_copies import working_copies
from tests.models import tiny_config
from tests.sleep.oracle import causal_layout

BF16 = torch.bfloat16


def layer(bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return Linear(8, 5, bias=bias)


@contextmanager
def in_bf16(model: nn.Module, copies: bool) -> Iterator[None]:
    with computing_in(model, BF16):
        if not copies:
            yield
            return
        with working_copies(model):
            yield


def uses(linear: Linear, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs, each of which the loss reads with another weight."""
    outputs = [linear(x) for x in xs]
    sum((number + 1) * y.float().square().sum() for number, y in enumerate(outputs)).backward()
    return outputs


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 8)])
def test_many_uses_equal_casts_of_their_own(copies: bool, bias: bool, shape: tuple[int, ...]) -> None:
    """Gradients of 16 uses add up in fp32, as under autocast without its cache, and not as with it."""
    xs = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in range(16)]
    ours, theirs = layer(bias), layer(bias)
    with in_bf16(ours, copies):
        found = uses(ours, xs)
    gradients = [x.grad for x in xs]
    for x in xs:
        x.grad = None
    with torch.autocast("cpu", BF16, cache_enabled=False):
        expected = uses(theirs, xs)
    for a, b in zip([*found, *gradients, ours.weight.grad], [*expected, *(x.grad for x in xs), theirs.weight.grad],
                    strict=True):  # fmt: skip
        assert a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)
    if bias:
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-2, atol=1e-2)


def test_the_sum_of_many_uses_is_not_rounded_to_bf16() -> None:
    linear, x = layer(bias=False), torch.ones(1, 8)
    with in_bf16(linear, copies=True):
        uses = [linear(x).sum() * (1.0 if number == 0 else 2.0**-9) for number in range(257)]
        torch.stack(uses).sum().backward()
    assert torch.equal(linear.weight.grad, torch.full((5, 8), 1.5)), "in bf16 each small term would vanish beside 1"


def test_without_a_compute_dtype_it_is_a_plain_layer() -> None:
    linear = layer().double()
    plain = nn.Linear(8, 5).double()
    plain.load_state_dict(linear.state_dict())
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(linear(x), plain(x)) and type(linear(x).grad_fn) is type(plain(x).grad_fn)


def test_copies_have_the_values_at_entry_and_end_with_the_block() -> None:
    model = Hybrid(tiny_config())
    model.init_weights(0)
    with pytest.raises(ZeroDivisionError), computing_in(model, BF16), working_copies(model):
        copies = {name: m.working_copy for name, m in model.named_modules() if isinstance(m, Linear)}
        assert all(torch.equal(copy, model.get_parameter(f"{n}.weight").to(BF16)) for n, copy in copies.items())
        assert torch.equal(model.working_copy, model.head_weight.to(BF16)), "the tied head has one too"
        raise ZeroDivisionError
    assert len(copies) > 5
    for module in model.modules():
        assert getattr(module, "working_copy", None) is None and getattr(module, "compute_dtype", None) is None
        assert getattr(module, "gradient", None) is None


def test_uses_add_to_the_gradient_that_the_matrix_has() -> None:
    linear, x = layer(bias=False), torch.ones(1, 8)
    linear.weight.grad = before = torch.full((5, 8), 0.5)
    with in_bf16(linear, copies=True):
        for _ in range(2):  # two backwards
            (linear(x).sum() + linear(x).sum()).backward()
    assert linear.weight.grad is before and torch.equal(before, torch.full((5, 8), 4.5))


@pytest.mark.parametrize("way", ["gradient hook", "accumulation hook", "frozen", "no gradients"])
def test_a_hook_reads_each_gradient_and_what_is_not_trained_has_none(way: str) -> None:
    linear, seen = layer(bias=False), list[torch.Tensor]()
    if way == "gradient hook":
        linear.weight.register_hook(seen.append)
    if way == "accumulation hook":
        linear.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    linear.weight.requires_grad_(way != "frozen")
    with torch.set_grad_enabled(way != "no gradients"), in_bf16(linear, copies=True):
        assert linear.gradient is None
        y = linear(torch.ones(1, 8, requires_grad=True)).sum()
        if y.requires_grad:
            y.backward()
    if "hook" in way:
        assert len(seen) == 1 and torch.equal(seen[0], torch.ones(5, 8))
    else:
        assert linear.weight.grad is None


def test_head_and_embeddings_that_are_tied_add_to_one_gradient() -> None:
    """The gradients of a model whose matrices have one at the start equal those that autograd adds up."""
    found = []
    for zeros in (False, True):
        model = Hybrid(tiny_config())
        model.init_weights(0)
        if not zeros:
            for p in model.parameters():
                p.register_hook(lambda gradient: None)
        tokens = torch.arange(12).view(2, 6)
        with in_bf16(model, copies=True):
            x, _ = model.run(model.embed(tokens), model.empty_state(), causal_layout(6))
            assert x is not None
            model.cross_entropy(x.flatten(0, 1), tokens.flatten()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None and torch.equal(gradient, found[1][name]), name


def test_embeddings_add_the_rows_that_were_read() -> None:
    """Ids that occur many times, in two uses and two backwards, beside what autograd adds up."""
    table, head = Embedding(7, 8), layer(bias=False)
    plain = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    ids, weights = torch.tensor([[3, 1, 3], [3, 0, 1]]), torch.randn(2, 3, 8)
    with in_bf16(nn.ModuleList([table, head]), copies=True):
        gradient = table.gradient
        for factor in (1, 2):
            (table(ids) * weights * factor + table(ids.flip(0))).sum().backward()
    assert table.gradient is None and table.weight.grad is gradient
    for factor in (1, 2):
        (plain(ids) * weights * factor + plain(ids.flip(0))).sum().backward()
    torch.testing.assert_close(gradient, plain.weight.grad)
    assert not gradient[[2, 4, 5, 6]].any() and gradient[3].any()


@pytest.mark.parametrize("tied", [True, False])
def test_each_matrix_has_one_copy(tied: bool) -> None:
    """Copies beside the embeddings, which a step reads row by row."""
    model = Hybrid(tiny_config(tie_embeddings=tied))
    matrices = [module.matrix for module in model.modules() if isinstance(module, Linear | Hybrid)]
    copied = [id(matrix) for matrix in matrices if matrix is not None]
    assert len(set(copied)) == len(copied) and id(model.head_weight) in copied


@pytest.mark.parametrize("dtype", [BF16, torch.float64])
def test_products_of_one_input_are_those_of_each_layer(dtype: torch.dtype) -> None:
    """Gradients too; that of the input is added up in the products. The loss reads the first and the last."""
    torch.manual_seed(0)
    layers = nn.ModuleList(Linear(8, n, bias=False) for n in (5, 3, 7)).to(torch.promote_types(dtype, torch.float32))
    layers[2].weight.requires_grad_(False)
    found = []
    for shared in (True, False):
        x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        with computing_in(layers, dtype), working_copies(layers):
            ys = products_of(x, list(layers)) if shared else [layer(x) for layer in layers]
            assert ("Shared" in type(ys[0].grad_fn).__name__) == shared
            (ys[0].square().sum() + ys[2].square().sum()).backward()
        found.append([*ys, x.grad, *(layer.weight.grad for layer in layers)])
        layers.zero_grad()
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype == BF16 else 1e-12, atol=1e-2 if dtype == BF16 else 0)


@pytest.mark.parametrize("why", ["a bias", "a hook", "no compute dtype", "another dtype"])
def test_layers_that_multiply_otherwise_are_called(why: str) -> None:
    linear, calls = Linear(8, 5, bias=why == "a bias"), list[object]()
    if why == "a hook":
        linear.register_forward_hook(lambda *_: calls.append(why))
    x = torch.randn(3, 8, dtype=torch.float32 if why in ("no compute dtype", "another dtype") else BF16)
    with computing_in(linear, None if why == "no compute dtype" else BF16):
        [y] = products_of(x, [linear])
        assert torch.equal(y, linear(x)) and "Shared" not in type(y.grad_fn).__name__
    assert len(calls) == 2 * (why == "a hook")


def test_layers_of_a_mixer_from_outside_are_adopted() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.SiLU())

    mixer = Foreign()
    weight = mixer.inner[0].weight
    adopt_linears(mixer)
    assert isinstance(mixer.inner[0], Linear) and mixer.inner[0].weight is weight
    with in_bf16(mixer, copies=True):
        assert mixer.inner(torch.ones(1, 8)).dtype == BF16
