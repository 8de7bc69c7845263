"""The tensor parallel model equals one process: loss, logits, states, and every gradient, also of the states."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model import compiled
from sleeptrain.model import hybrid as hybrid_module
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import Boundary
from sleeptrain.parallel.build import build_model
from sleeptrain.parallel.tensor.layers import TensorParallelHybrid
from sleeptrain.parallel.tensor.sharding import ModelSharding
from tests.parallel.cases import (
    ONE_DOCUMENT,
    OTHER_OPTIONS,
    Case,
    Outcome,
    assert_same_outcome,
    join_outcomes,
    mesh_of,
    run_rank,
    run_single,
    tensors,
)
from tests.parallel.processes import run_cases, run_ranks, selected
from tests.sleep.oracle import causal_layout

EXACT = dict(rtol=1e-9, atol=1e-10)

CASES = {
    "one pass": Case(),
    "three passes": Case(passes=3),
    "three passes, one document, untied": Case(passes=3, documents=ONE_DOCUMENT, tied=False),
    "unlabelled, memory carried in": Case(passes=3, when="unlabelled", carried=True, documents=ONE_DOCUMENT),
    "without feedback": Case(passes=3, feedback="none"),
    "prelude, core, coda": Case(
        ("gated_deltanet", "attention", "gated_deltanet", "mamba2"), passes=3, core=(1, 3), carried=True
    ),
    "sliding, memory carried in": Case(passes=2, boundary=Boundary(sliding_window=4), carried=True),
    "sliding core, untied, without feedback": Case(
        ("gated_deltanet", "attention", "gated_deltanet", "mamba2"),
        passes=3,
        core=(1, 3),
        boundary=Boundary(sliding_window=4),
        feedback="none",
        tied=False,
        carried=True,
    ),
    "carried convolutions": Case(passes=2, boundary=Boundary(carry_conv=True), carried=True, tied=False),
    "recomputed blocks": Case(passes=3, recompute="block"),
    "recomputed between products": Case(passes=3, recompute="selective", carried=True),
    "recomputed between products, tokens split": Case(
        ("jet", "attention", "mamba2"),
        passes=2,
        recompute="selective",
        sequence=True,
        multiple=2,
        num_kv_heads=1,
        model={"sandwich_norms": True},
    ),
    "recomputed passes": Case(passes=3, recompute="pass", carried=True),
    "recomputed windows": Case(passes=3, recompute="window"),
    "shared key-value head and group": Case(
        passes=2, num_kv_heads=1, num_groups=1, boundary=Boundary(sliding_window=4, carry_conv=True), carried=True
    ),
    "jet and sliding attention": Case(
        ("sliding_attention", "jet", "attention"),
        passes=2,
        model={"attention.qkv_bias": True},
        boundary=Boundary(carry_conv=True),
        carried=True,
    ),
    "jet, sliding both ways, shared key-value head": Case(
        ("jet", "sliding_attention"),
        passes=2,
        model={"attention.qkv_bias": True},
        num_kv_heads=1,
        boundary=Boundary(sliding_window=4),
        carried=True,
    ),
    "sandwich norms, a mixer alone, a norm between passes": Case(
        ("attention", "jet", "attention"),
        passes=3,
        model={
            "mixer_only": [1],
            "sandwich_norms": True,
            "norm_between_passes": True,
            "norm": "plain",
        },
        recompute="pass",
    ),
    "the same, tokens split between mixers": Case(
        ("attention", "jet", "attention"),
        passes=3,
        model={"mixer_only": [1], "sandwich_norms": True, "norm_between_passes": True},
        sequence=True,
        multiple=2,
        tied=False,
    ),
    "options of other families": Case(passes=2, carried=True, model=OTHER_OPTIONS),
    "options of other families, tokens split": Case(
        passes=2, sequence=True, multiple=2, model=OTHER_OPTIONS, tied=False
    ),
    "divisible vocabulary": Case(vocab_size=16, tied=False),
    "a rank of padding only": Case(vocab_size=5, tied=False),
    "tokens split between mixers": Case(passes=3, sequence=True, multiple=4, recompute="pass", carried=True),
    "tokens split, prelude and coda": Case(
        ("gated_deltanet", "attention", "mamba2"),
        passes=2,
        core=(1, 2),
        sequence=True,
        multiple=4,
        num_groups=1,
        num_kv_heads=1,
    ),
}


MIXED = ("attention", "gated_deltanet", "mamba2", "jet")
COMPILED = {
    "one pass": Case(("attention", "gated_deltanet"), compiled=True),
    "shared key-value head and group": Case(MIXED, passes=2, num_kv_heads=1, num_groups=1, carried=True, compiled=True),
    "tokens split between mixers": Case(MIXED, passes=2, sequence=True, multiple=2, recompute="block", compiled=True),
    "bf16": Case(("attention", "gated_deltanet"), precision="bf16", dtype=torch.float32, compiled=True),
}


def spread(case: Case, size: int) -> Outcome:
    return join_outcomes(case, run_ranks(run_rank, size, case, size))


# On four ranks the two key-value heads and groups are shared, and the vocabulary is padded more.
ON_FOUR = (
    "three passes",
    "prelude, core, coda",
    "sliding, memory carried in",
    "carried convolutions",
    "recomputed passes",
    "shared key-value head and group",
    "jet, sliding both ways, shared key-value head",
    "sandwich norms, a mixer alone, a norm between passes",
    "divisible vocabulary",
    "a rank of padding only",
    "tokens split between mixers",
)
FAST_ON_FOUR = ("recomputed passes", "jet, sliding both ways, shared key-value head", "tokens split between mixers")
# What these have is in other cases too.
SLOW_ON_TWO = (
    *FAST_ON_FOUR,
    "one pass",
    "three passes",
    "recomputed blocks",
    "options of other families, tokens split",
)
Parts = dict[str, list[Outcome]]


def marked(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


@pytest.fixture(scope="module")
def on_two(request: pytest.FixtureRequest, imported: None) -> Parts:
    names = selected(request, "test_two_ranks_equal_one_process", "name")
    return run_cases(partial(run_rank, size=2), 2, {name: CASES[name] for name in names})


@pytest.mark.parametrize("name", marked(CASES, SLOW_ON_TWO))
def test_two_ranks_equal_one_process(name: str, on_two: Parts):
    case = CASES[name]
    assert_same_outcome(join_outcomes(case, on_two[name]), run_single(case), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_two_ranks_with_compiled_blocks_equal_eager_ones(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    case = COMPILED[name]
    tolerance = EXACT if case.dtype == torch.float64 else dict(rtol=2e-2, atol=2e-3)
    assert_same_outcome(spread(case, 2), spread(replace(case, compiled=False), 2), **tolerance)


@pytest.fixture(scope="module")
def on_four(request: pytest.FixtureRequest, imported: None) -> Parts:
    names = selected(request, "test_four_ranks_equal_one_process", "name")
    return run_cases(partial(run_rank, size=4), 4, {name: CASES[name] for name in names})


@pytest.mark.parametrize("name", marked(ON_FOUR, set(ON_FOUR) - set(FAST_ON_FOUR)))
def test_four_ranks_equal_one_process(name: str, on_four: Parts):
    case = CASES[name]
    assert_same_outcome(join_outcomes(case, on_four[name]), run_single(case), **EXACT)


def test_logits_of_some_rows_at_a_time_equal_one_process(monkeypatch: pytest.MonkeyPatch):
    case = Case(passes=2, tied=False)
    expected = run_single(case)
    monkeypatch.setattr(hybrid_module, "MOST_LOGITS", 2 * case.vocab_size)  # of a rank, four rows or two
    assert_same_outcome(spread(case, 2), expected, **EXACT)


def assert_same_to_rounding(found: Outcome, expected: Outcome, exact: Outcome, loss: float, gradients: float) -> None:
    """Ranks round differently from one process, but hardly more, on any processor; `exact` has more digits."""
    torch.testing.assert_close(found.loss, expected.loss, rtol=loss, atol=0)
    for name, gradient in exact.gradients.items():
        rounding = (expected.gradients[name] - gradient).norm()
        assert (found.gradients[name] - gradient).norm() <= 2 * rounding + gradients * gradient.norm(), name


def test_four_ranks_equal_one_process_in_fp32():
    case = Case(passes=3, dtype=torch.float32, num_kv_heads=1, carried=True)
    exact = run_single(replace(case, dtype=torch.float64))
    assert_same_to_rounding(spread(case, 4), run_single(case), exact, loss=1e-5, gradients=1e-5)


def test_bf16_equals_one_process_to_its_rounding():
    case = Case(passes=2, dtype=torch.float32, precision="bf16", num_kv_heads=1, num_groups=1)
    exact = run_single(replace(case, precision="fp32"))
    assert_same_to_rounding(spread(case, 2), run_single(case), exact, loss=2e-2, gradients=0.02)


def _initial(part: tuple[Case, range | None]) -> dict[str, torch.Tensor]:
    case, layers = part
    model = build_model(case.config, mesh_of(4), layers)
    assert isinstance(model, TensorParallelHybrid)
    model.init_weights(3)
    assert all(p.tensor_model_parallel == (model.sharding[n].dim is not None) for n, p in model.named_parameters())
    return model.state_dict()


PARTS = {
    f"{kind}, {part}": (case, layers)
    for kind, case in {"tied": Case(), "shared": Case(num_kv_heads=1, num_groups=1, tied=False)}.items()
    for part, layers in {"whole": None, "first stage": range(1), "last stage": range(1, 3)}.items()
}


@pytest.fixture(scope="module")
def initial(imported: None) -> dict[str, list[dict[str, torch.Tensor]]]:
    return run_cases(_initial, 4, PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_first_weights_and_names_are_those_of_one_process(part: str, initial: dict[str, list[dict[str, torch.Tensor]]]):
    (case, layers), shards = PARTS[part], initial[part]
    one = Hybrid(case.config, layers)
    one.init_weights(3)
    sharding = ModelSharding(case.config, 4)
    assert list(shards[0]) == list(one.state_dict())
    for name, weight in one.state_dict().items():
        assert torch.equal(sharding.join(name, [shard[name] for shard in shards]), weight), name


def _collectives(case: Case) -> tuple[list[str], list[str]]:
    """The collectives of a wake pass over one window, forward and backward."""
    model = build_model(case.config, Mesh.build(2, 1)).double()
    seen: list[str] = []
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast"):
        _count(name, seen)
    with Functional(seen):
        x, state = model.run(model.embed(torch.zeros(1, 4, dtype=torch.long)), model.empty_state(), causal_layout(4))
        loss = model.cross_entropy(x[0], torch.zeros(4, dtype=torch.long)) + sum(t.sum() for t in tensors(state))
        forward, seen[:] = seen.copy(), []
        loss.backward()
    return forward, seen


class Functional(TorchDispatchMode):
    """Notes the functional collectives, whose calls do not go through `torch.distributed`."""

    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and func._opname != "wait_tensor":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def _count(name: str, seen: list[str]) -> None:
    original = getattr(dist, name)

    def counted(*args: object, **options: object) -> object:
        seen.append(name)
        return original(*args, **options)

    setattr(dist, name, counted)


def test_each_region_costs_one_reduction_each_way():
    """Two regions a block, embedding and head; the backward adds one for each parameter that ranks use partly."""
    forward, backward = run_ranks(_collectives, 2, Case(("attention", "gated_deltanet")))[0]
    blocks, embedding, cross_entropy = 2 * 2, 1, 3
    assert forward == ["all_reduce"] * (blocks + embedding + cross_entropy)
    head, query_and_key_norm, gated_norm = 1, 2, 1
    assert backward == ["all_reduce"] * (blocks + head + query_and_key_norm + gated_norm)
