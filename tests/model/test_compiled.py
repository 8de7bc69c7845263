"""Blocks under torch.compile equal eager ones, in one graph each, and few graphs serve all steps.

Most tests stop after torch's tracing (`aot_eager`), which makes the graphs of both directions, or run what is traced as
it is (`eager`), where only the number of graphs counts. Code by inductor takes a minute a block on a CPU.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from sleeptrain.config.schema import Config, TrainConfig
from sleeptrain.data.batch import Batch
from sleeptrain.errors import ConfigError
from sleeptrain.model import compiled
from sleeptrain.model.compiled import compile_blocks, compile_clock, naming_compilation
from sleeptrain.model.document_layout import DocumentLayout, first_of_document, window_layout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.mixers.registry import mixer_spec
from sleeptrain.model.state import HARD, Boundary, LayerState, Recurrent
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.step import StepResult, forward_backward, step_context
from tests.models import random_batch, tiny_model
from tests.ops.stand_in import ZerosForKernels

MIXERS = ("attention", "sliding_attention", "gated_deltanet", "jet", "mamba2")
EXACT = dict(rtol=1e-9, atol=1e-11)
CLOSE = dict(rtol=2e-4, atol=2e-5)
DOCUMENTS = [[0] * 13, [0] * 5 + [1] * 8]
SHAPE = StepShape(passes=2, window=8, batch=2)


def slow(*values: object) -> list[object]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()  # it forgets callbacks, too
    compile_clock.cache_clear()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def only_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def graphs() -> int:
    """The graphs made so far; each is a whole block."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def pair(layers: list[str], dtype: torch.dtype = torch.float64) -> tuple[Hybrid, Hybrid]:
    """A model, and the same model with compiled blocks."""
    eager = tiny_model(layers).to(dtype)
    other = copy.deepcopy(eager)
    compile_blocks(other)
    return eager, other


def layout(documents: bool) -> DocumentLayout:
    ids = torch.tensor([[0] * 8, [1] * 3 + [2] * 5] if documents else [[0] * 8, [1] * 8])
    return window_layout(ids, first_of_document(ids))


def state_of(model: Hybrid) -> LayerState:
    kind = model.config.layers[0]
    spec = mixer_spec(model.config, kind)
    if not spec.recurrent:
        return None
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, *spec.state_shape), (2, spec.conv_size - 1, sum(spec.conv_pieces)))
    dtype = next(model.parameters()).dtype
    S, tail = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)
    return Recurrent(S, tail)


def outcome(model: Hybrid, made: DocumentLayout, boundary: Boundary, state_only: bool = False) -> list[torch.Tensor]:
    """Results of the first block and the gradients of all that it reads."""
    generator = torch.Generator().manual_seed(0)
    weight = next(model.parameters())
    x = torch.randn(2, 8, 16, generator=generator, dtype=weight.dtype).requires_grad_()
    state = state_of(model)
    y, after = model.blocks[0](x, state, made, boundary, state_only)
    results = [y] if y is not None else []
    leaves = [x, *model.blocks[0].parameters()]
    if isinstance(state, Recurrent):
        assert isinstance(after, Recurrent)
        results += [after.S_BHKV, after.conv_BWD]
        leaves += [state.S_BHKV, state.conv_BWD]
    gradients = torch.autograd.grad([t.sin().sum() for t in results], leaves, allow_unused=state_only)
    return [*results, *(g for g in gradients if g is not None)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], **tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("documents", [*slow(False), True])
@pytest.mark.parametrize("kind", ["attention", "gated_deltanet", *slow("sliding_attention", "jet", "mamba2")])
def test_a_block_is_one_graph_and_equals_the_eager_block(kind: str, documents: bool) -> None:
    eager, other = pair([kind])
    boundary = Boundary(carry_conv=True)
    assert_same(outcome(other, layout(documents), boundary), outcome(eager, layout(documents), boundary), **EXACT)
    assert graphs() == 1


@pytest.mark.parametrize("kind", ["gated_deltanet", *slow("jet", "mamba2")])
def test_a_block_that_only_leaves_a_state(kind: str) -> None:
    eager, other = pair([kind])
    found = outcome(other, layout(True), Boundary(carry_conv=True), state_only=True)
    assert_same(found, outcome(eager, layout(True), Boundary(carry_conv=True), state_only=True), **EXACT)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", MIXERS)
def test_code_by_inductor_equals_the_eager_block(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    eager, other = pair([kind], dtype)
    boundary, made = Boundary(carry_conv=True), layout(True)
    tolerance = EXACT if dtype == torch.float64 else CLOSE
    assert_same(outcome(other, made, boundary), outcome(eager, made, boundary), **tolerance)


class OnGpu(ZerosForKernels):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


@pytest.mark.parametrize("kind", ["gated_deltanet", *slow("attention", "sliding_attention", "jet", "mamba2")])
def test_on_a_gpu_a_block_is_one_graph_of_operators(kind: str) -> None:
    """Kernels are absent: what runs are the graphs around them."""
    _, other = pair([kind], torch.float32)
    with as_on_gpu(), OnGpu():
        outcome(other, layout(True), Boundary(carry_conv=True))
    assert graphs() == 1


def test_blocks_of_one_kind_share_their_graph(only_traced: None) -> None:
    eager, model = pair(["attention", "gated_deltanet"] * 3)
    x = torch.randn(2, 8, 16, dtype=torch.float64).requires_grad_()
    y, _ = model.run(x, model.empty_state(), layout(True))
    assert graphs() == 2
    torch.testing.assert_close(y, eager.run(x, eager.empty_state(), layout(True))[0], **EXACT)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in eager.named_parameters()]


def step(model: Hybrid, batch: Batch, shape: StepShape = SHAPE, **train: object) -> StepResult:
    """A training step; the gradients are in the parameters."""
    recompute = train.pop("recompute", "none")
    config = Config(model=model.config, train=TrainConfig(tokens=1, **train))  # type: ignore[arg-type]
    config.sleep.recompute = str(recompute)
    model.zero_grad()
    return forward_backward(step_context(config, shape, model), model, batch, shape, None)


def assert_same_step(eager: Hybrid, other: Hybrid, batch: Batch, **train: object) -> None:
    expected, found = step(eager, batch, **train), step(other, batch, **train)
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    for (name, p), q in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(found.state.layers, expected.state.layers, strict=True):
        if isinstance(b, Recurrent):
            assert isinstance(a, Recurrent)
            torch.testing.assert_close(a.S_BHKV, b.S_BHKV, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "none", "block", "pass", "window"])
def test_a_training_step_equals_the_eager_step(recompute: str) -> None:
    eager, other = pair(["gated_deltanet"] if recompute == "pass" else ["attention", "gated_deltanet"])
    batch = random_batch(DOCUMENTS, continues=[True, True])
    assert_same_step(eager, other, batch, recompute=recompute)


@pytest.mark.parametrize("kind", ["gated_deltanet", *slow("attention")])
def test_selective_recomputation_is_part_of_the_compiled_code(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of the backward has no product of the forward, but norms again, which `none` keeps."""
    backwards = list[Counter[str]]()

    def of_backward(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        backwards.append(Counter(str(node.target) for node in graph.graph.nodes))
        return graph

    monkeypatch.setattr(compiled, "BACKEND", aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=of_backward))
    for mode in ("none", "selective"):
        _, model = pair([kind])
        step(model, random_batch([[0] * 8], continues=[True]), StepShape(1, 8, 1), recompute=mode)
    none, selective = backwards
    assert none["aten.mm.default"] == selective["aten.mm.default"] > 0
    assert none["aten.linalg_vector_norm.default"] < selective["aten.linalg_vector_norm.default"]


def packed(rows: int, length: int, seed: int) -> Batch:
    """Rows of several documents with random cuts."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(rows, length, generator=generator) < 0.2
    return random_batch(begins.long().cumsum(1).tolist(), seed, continues=[True] * rows)


def steps(model: Hybrid, numbers: range) -> int:
    """Steps of all shapes; the number of graphs after them."""
    for n in numbers:
        rows, window = 2 + n % 3, 12 + 2 * (n % 5)
        shape = StepShape(passes=2, window=window, batch=rows)
        step(model, packed(rows, 2 * window - n % 4, seed=n), shape)
    return graphs()


@pytest.mark.slow
def test_graphs_do_not_grow_with_many_steps() -> None:
    model = tiny_model(["gated_deltanet", "attention"]).float()
    compile_blocks(model)
    assert steps(model, range(40)) <= 20


@pytest.mark.parametrize("gpu", [*slow(False), True])
def test_graphs_do_not_grow_with_steps(gpu: bool, request: pytest.FixtureRequest) -> None:
    """Other cuts of documents, lengths and numbers of rows are variables of the graphs."""
    if gpu:
        request.getfixturevalue("only_traced")
    model = tiny_model(["gated_deltanet"] if gpu else ["gated_deltanet", "attention"]).float()
    compile_blocks(model)
    with as_on_gpu() if gpu else nullcontext(), OnGpu() if gpu else nullcontext():
        made = steps(model, range(5))
        assert made <= 16
        assert made == steps(model, range(3, 5))


def test_copies_of_the_weights_cause_no_new_graph(only_traced: None) -> None:
    model = tiny_model(["gated_deltanet", "attention"]).float()
    compile_blocks(model)
    batch = random_batch([[0] * 16, [0] * 16], continues=[True, True])
    step(model, batch, precision="bf16", residual="bf16")
    before = graphs()
    for _ in range(2):
        step(model, batch, precision="bf16", residual="bf16")
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
    assert graphs() == before


@pytest.mark.slow
def test_weights_that_thaw_get_gradients() -> None:
    eager, other = pair(["gated_deltanet"] * 2)
    batch = random_batch(DOCUMENTS, continues=[True, True])
    for model in (eager, other):
        model.blocks[0].requires_grad_(False)
    step(other, batch)
    assert all(p.grad is None for p in other.blocks[0].parameters())
    for model in (eager, other):
        model.blocks[0].requires_grad_(True)
    assert_same_step(eager, other, batch)


def test_a_hook_of_a_block_runs_around_its_code(only_traced: None) -> None:
    _, model = pair(["attention"])
    seen: list[torch.Tensor] = []
    handle = model.blocks[0].register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    y, _ = model.run(x, model.empty_state(), layout(False))
    handle.remove()
    model.run(x, model.empty_state(), layout(False))
    assert len(seen) == 1 and seen[0] is y
    assert graphs() == 1


def test_a_break_is_an_error_that_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair(["attention"])
    forward = type(model.blocks[0].mlp).forward

    def broken(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(type(model.blocks[0].mlp), "forward", broken)
    with pytest.raises(ConfigError, match=r"train\.compile=false"), naming_compilation():
        model.blocks[0](torch.randn(2, 8, 16, dtype=torch.float64), None, layout(False), HARD)


def test_the_clock_counts_graphs_and_time(only_traced: None) -> None:
    compile_clock().take()
    _, model = pair(["attention"])
    model.run(torch.randn(2, 8, 16, dtype=torch.float64), model.empty_state(), layout(False))
    text = compile_clock().take()
    assert text is not None and "1 graphs" in text
    seconds = float(text.rpartition(" in ")[2].split()[0])
    assert seconds > 0
    assert compile_clock().take() is None
