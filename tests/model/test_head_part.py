"""Parts of a model that share its head: their rows, and the loss of all parts together."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.model.head_part import HeadPart
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.linear import computing_in
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.model.working_copies import working_copies
from tests.models import tiny_config

LAYERS = ["gated_deltanet", "attention", "gated_deltanet"]


def whole_and_parts(tied: bool) -> tuple[Hybrid, list[Hybrid]]:
    config = tiny_config(LAYERS, tie_embeddings=tied)
    parts = [Hybrid(config, range(i, i + 1), VocabularyPart(i, 3)) for i in range(3)]
    models = [Hybrid(config), *parts]
    for model in models:
        model.init_weights(3)
    return models[0], models[1:]


@pytest.mark.parametrize("tied", [True, False])
def test_each_part_draws_its_rows_of_the_whole_head(tied: bool) -> None:
    whole, parts = whole_and_parts(tied)
    assert torch.equal(torch.cat([part.head_weight for part in parts]), whole.head_weight)
    assert [i for part in parts for i in part.vocabulary] == list(range(whole.config.vocab_size))
    assert parts[0].embedding is not None and whole.embedding is not None
    assert torch.equal(parts[0].embedding.weight, whole.embedding.weight), "the first part embeds all tokens"
    held = ["embedding.weight" in part.state_dict() for part in parts]
    assert held == ([True] * 3 if tied else [True, False, False])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_parts_together_have_the_loss_and_the_gradients_of_the_head(tied: bool, dtype: torch.dtype | None) -> None:
    whole, parts = whole_and_parts(tied)
    draw = torch.Generator().manual_seed(1)
    x_ND = torch.randn(9, whole.config.dim, generator=draw)
    targets_N = torch.randint(whole.config.vocab_size, (9,), generator=draw)
    leaf = x_ND.clone().requires_grad_()
    with computing_in(whole, dtype), working_copies(whole):
        loss = whole.cross_entropy(leaf, targets_N)
        loss.backward()
    statistics, kept, total = [], [], torch.zeros(())
    with computing_in(parts[2], dtype):
        mine = x_ND.clone().requires_grad_()
        head_input = parts[2].head_input(mine)
    for part in parts:
        with computing_in(part, dtype), working_copies(part), torch.no_grad():
            found = HeadPart(part).statistics(head_input.detach(), targets_N, keep=True)
        statistics.append(found[0])
        kept.append(found[1])
    log_sums, target_logits = parts[2].join_statistics(statistics)
    gradient = torch.zeros_like(x_ND)
    for part, logits in zip(parts, kept, strict=True):
        x_leaf = head_input.detach().requires_grad_()
        with computing_in(part, dtype), working_copies(part):
            HeadPart(part).objective(x_leaf, targets_N, log_sums, logits).backward()
        gradient += x_leaf.grad
    (head_input * gradient).sum().backward()
    total = (log_sums - target_logits).sum()
    tolerance = dict(rtol=1e-5, atol=1e-6) if dtype is None else dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(total, loss.detach(), **tolerance)
    torch.testing.assert_close(mine.grad, leaf.grad, **tolerance)
    found_rows = torch.cat([_gradient(part, tied) for part in parts])
    torch.testing.assert_close(found_rows, _gradient(whole, tied), **tolerance)


def _gradient(model: Hybrid, tied: bool) -> torch.Tensor:
    """The gradient of the rows of the head that the model predicts with."""
    holder = model.embedding if tied else model.head
    assert holder is not None and holder.weight.grad is not None
    return holder.weight.grad[model.used_rows] if tied and model.used_rows is not None else holder.weight.grad


def test_the_logits_of_the_parts_are_those_of_the_head() -> None:
    whole, parts = whole_and_parts(True)
    x_ND = torch.randn(4, whole.config.dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = parts[2].join_logits([HeadPart(part).logits(parts[2].head_input(x_ND)) for part in parts])
        torch.testing.assert_close(found, whole.logits(x_ND), rtol=1e-5, atol=1e-6)
