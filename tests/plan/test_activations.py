"""The activations that autograd keeps, against the count of a plan."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch
from benchmarks.live_bytes import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.model import hybrid as hybrid_module
from sleeptrain.model.block import Block
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.linear import Product, computing_in
from sleeptrain.model.mixers.attention import Attention
from sleeptrain.model.mixers.registry import mixer_spec
from sleeptrain.model.state import HARD, FastWeights, Recurrent
from sleeptrain.model.working_copies import working_copies
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.ops.document_attention import DocumentBounds
from sleeptrain.plan.activations import Activations, state_bytes
from sleeptrain.plan.layout import make_plan
from sleeptrain.plan.workload import typical_batch
from sleeptrain.sleep.curriculum import stage_shape
from sleeptrain.sleep.loop import loop_settings, run_rounds
from sleeptrain.sleep.precision import DTYPES, in_precision
from sleeptrain.sleep.recompute import Recompute, with_recompute
from sleeptrain.sleep.rounds import Round, plan_batch

# docs/plan.md. The inputs of checkpointed blocks are counted once too often where the head keeps one of them too.
ACCURACY, OF_BLOCK_INPUTS = 0.03, 0.1
MODEL = (
    "experiment=stdlib",
    "model.dim=96",
    "model.ffn_dim=256",
    "model.vocab_size=300",
    "model.init_std=0.1",
    "model.attention.num_heads=6",
    "model.attention.num_kv_heads=3",
    "model.gated_deltanet.num_v_heads=8",
    "model.mamba2.num_groups=2",
    "data.sequence=400",
    "data.batch=2",
    "sleep.window=160",
    "sleep.curriculum=[]",
    "sleep.passes=2",
    "train.device=cpu",
)


BLOCKS = [
    ("gated_deltanet",),
    ("jet",),
    ("mamba2",),
    ("attention",),
    ("attention", "model.attention.qk_norm=none", "model.sandwich_norms=true"),
    ("attention", "model.attention.qk_norm=all", "model.attention.post_norm=true"),
    ("attention", "model.attention.gate=false"),
    ("sliding_attention", "model.attention.sliding_window=50"),
    ("sliding_attention", "model.attention.sliding_window=50", "model.attention.gate=false"),
]


def saved_bytes(function: Callable[[], Any], weights: Iterable[torch.Tensor]) -> int:
    """The bytes of the storages that the graph of `function` keeps, without weights."""
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    storages = {weight.untyped_storage()._cdata for weight in weights}
    assert result is not None
    return sum(size for at, (size, _) in kept.items() if at not in storages)


def held_bytes(function: Callable[[], Any], weights: Iterable[torch.Tensor]) -> int:
    """The bytes of the storages that the graph of `function` and its result hold, without weights.

    Selective recomputation keeps results outside of autograd, so no hook of autograd sees them.
    """
    with LiveBytes() as memory:
        seen = [weight.view_as(weight) for weight in weights]
        before = memory.live
        result = function()
        gc.collect()
        held = memory.live - before
    assert seen and result is not None
    return held


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "more",
    [
        ("model.layers=[gated_deltanet]", "sleep.passes=1"),
        ("model.layers=[mamba2]", "sleep.passes=1"),
        ("model.layers=[attention,attention,attention,attention,gated_deltanet]", "sleep.passes=1"),
        ("model.layers=[gated_deltanet,attention,mamba2]", "model.attention.gate=false"),
        ("model.layers=[gated_deltanet,attention,mamba2]", "model.attention.qk_norm=none", "sleep.core=[0,2]"),
        ("model.layers=[mamba2,attention,gated_deltanet]", "sleep.passes=4", "sleep.recompute=block"),
        ("model.layers=[mamba2,attention,gated_deltanet]", "sleep.passes=4", "sleep.recompute=selective"),
        ("model.layers=[jet,jet,sliding_attention,attention]", "sleep.passes=2", "sleep.recompute=selective"),
        ("model.layers=[jet]", "sleep.passes=1"),
        (
            "model.layers=[sliding_attention,jet,jet,attention]",
            "model.mixer_only=[1]",
            "model.attention.sliding_window=50",
            "model.attention.qkv_bias=true",
            "model.sandwich_norms=true",
            "model.norm_between_passes=true",
        ),
        (
            "model.layers=[attention,gated_deltanet,mamba2]",
            "model.norm=plain",
            "model.attention.post_norm=true",
            "model.attention.qk_norm=all",
            "model.attention.gate=false",
            "model.residual_multiplier=0.5",
            "model.embedding_multiplier=2",
            "model.logits_divisor=2",
            "model.gated_deltanet.allow_neg_eigval=true",
        ),
    ],
    ids=lambda more: more[0].partition("=")[2] + more[1],
)
def test_the_graphs_of_a_step(more: tuple[str, ...], precision: str) -> None:
    config = compose([*MODEL, *more, f"train.precision={precision}"])
    model, shape = Hybrid(config.model), stage_shape(config, 0)
    model.init_weights(0)
    batch = typical_batch(config, shape.batch)
    [step] = make_plan(config, 1, None, 0.4).steps
    rounds = step.workload.rounds
    settings = loop_settings(config.sleep, shape.window, model.num_layers)

    def forward() -> Any:
        with in_precision(config.train, model):
            return run_rounds(model, batch, rounds, model.empty_state(), settings)

    planned = step.memory[0].activations
    by_block = config.sleep.recompute in ("block", "selective")
    if by_block:  # the backward makes those of one block
        counts = Activations.of(config, kernels=False)
        planned -= max(counts.block(i, r, False) for i in range(model.num_layers) for r in rounds)
        planned -= counts.copies(range(model.num_layers), head_rows=0)
    for p in model.parameters():  # a step's products add to gradients that are there before
        p.grad = torch.zeros_like(p)
    measured = held_bytes if config.sleep.recompute == "selective" else saved_bytes
    assert measured(forward, model.parameters()) == pytest.approx(
        planned, rel=OF_BLOCK_INPUTS if by_block else ACCURACY
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_graph_of_a_loss_without_whole_logits(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid_module, "MOST_LOGITS", 64 * 300)
    more = ("model.layers=[gated_deltanet]", "sleep.passes=1", f"train.precision={precision}", "model.vocab_size=3000")
    config = compose([*MODEL, *more])
    model, shape = Hybrid(config.model), stage_shape(config, 0)
    model.init_weights(0)
    batch = typical_batch(config, shape.batch)
    [step] = make_plan(config, 1, None, 0.4).steps
    settings = loop_settings(config.sleep, shape.window, model.num_layers)

    def forward() -> Any:
        with in_precision(config.train, model):
            return run_rounds(model, batch, step.workload.rounds, model.empty_state(), settings)

    assert saved_bytes(forward, model.parameters()) == pytest.approx(step.memory[0].activations, rel=ACCURACY)
    rows, gradient = 3 * 4 * 4 * 3000, 4 * 3000 * config.model.dim
    assert step.memory[0].logits == rows + gradient, "four rows at a time"


def two_documents(rows: int, length: int, with_bounds: bool) -> DocumentLayout:
    """The layout of rows of two documents by bounds, or of one document: a mask of documents is not counted."""
    documents = torch.zeros(rows, length, dtype=torch.long)
    bounds = None
    if with_bounds:
        ends = torch.arange(0, 2 * rows + 1, dtype=torch.int32) * (length // 2)
        bounds = DocumentBounds(ends, ends, length, length, None, False)
    return DocumentLayout(documents, None, None, None, bounds=bounds)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 throughout"])
@pytest.mark.parametrize(
    ("more", "state_only"),
    [*((more, False) for more in BLOCKS), *((more, True) for more in BLOCKS if "attention" not in more[0])],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else f"{value}",
)
def test_the_graph_of_a_block_on_a_gpu(more: tuple[str, ...], state_only: bool, precision: str) -> None:
    """By fake tensors: torch knows what the operators around the kernels save."""
    kind, *settings = more
    residual = "bf16" if "throughout" in precision else "fp32"
    dtypes = (f"train.precision={precision[:4]}", f"train.residual={residual}")
    config = compose([*MODEL, f"model.layers=[{kind},gated_deltanet]", *settings, *dtypes])
    [r, *_] = plan_batch(typical_batch(config, 2), 160, 1, config.sleep)
    rows, length, narrow = len(r.rows), r.stop - r.start, torch.bfloat16 if "bf16" in precision else None
    spec = mixer_spec(config.model, kind)
    with FakeTensorMode(), as_on_gpu():
        block = Block(0, config.model)
        x = torch.zeros(rows, length, config.model.dim, dtype=DTYPES[residual], requires_grad=True)
        state = Recurrent(torch.zeros(rows, *spec.state_shape, requires_grad=True)) if spec.recurrent else None
        with computing_in(block, narrow), working_copies(block):
            copies = [part.working_copy for part in block.modules() if isinstance(part, Product)]
            weights = [*block.parameters(), *(copy for copy in copies if copy is not None)]
            with_bounds = not spec.recurrent and cast(Attention, block.mixer).reads_bounds
            assert with_bounds == ("attention" in kind and narrow is not None)
            layout = two_documents(rows, length, with_bounds)
            found = saved_bytes(lambda: block(x, state, layout, HARD, state_only), weights)
    planned = Activations.of(config, kernels=True).block(0, r, state_only)
    assert found == pytest.approx(planned, rel=ACCURACY)


@pytest.mark.parametrize("kinds", [("gated_deltanet", "attention"), ("mamba2", "jet")], ids=" ".join)
def test_what_blocks_keep_on_a_gpu_under_selective_recomputation(kinds: tuple[str, str]) -> None:
    layers = f"model.layers=[{','.join([*kinds, *kinds])}]"
    config = compose([*MODEL, layers, "train.precision=bf16", "sleep.recompute=selective"])
    held, planned = on_gpu(config, rows=2, length=160)
    assert held == pytest.approx(planned, rel=ACCURACY)


def test_a_round_of_the_2b_model_keeps_less_than_4_gib() -> None:
    """L=2048, one row, bf16; without recomputation it keeps nearly twice as much."""
    config = compose(["experiment=pretrain_2b", "sleep.recompute=selective"])
    held, planned = on_gpu(config, rows=1, length=2048)
    assert held == pytest.approx(planned, rel=ACCURACY)
    assert held < 3 * 2**30
    none, _ = on_gpu(with_recompute(config, "none"), rows=1, length=2048)
    assert 1.7 * held < none


def on_gpu(config: Config, rows: int, length: int) -> tuple[int, int]:
    """Bytes that the graph of a wake round's blocks holds with a GPU's kernels, by fake tensors, and as planned."""
    r = Round(0, 0, length, 1, tuple(range(rows)), coda=True)
    with FakeTensorMode(), as_on_gpu():
        model = Hybrid(config.model)
        x = torch.zeros(rows, length, config.model.dim, requires_grad=True)
        specs = [mixer_spec(config.model, kind) for kind in config.model.layers]
        state = FastWeights(
            tuple(
                Recurrent(torch.zeros(rows, *s.state_shape, requires_grad=True)) if s.recurrent else None for s in specs
            )
        )
        layout = DocumentLayout(torch.zeros(rows, length, dtype=torch.long), None, None, None)
        run_block = Recompute(config.sleep.recompute).block
        with computing_in(model, torch.bfloat16), working_copies(model):
            copies = [part.working_copy for part in model.modules() if isinstance(part, Product)]
            weights = [*model.parameters(), *(copy for copy in copies if copy is not None)]
            held = held_bytes(lambda: model.run(x, state, layout, run_block=run_block), weights)
    counts, layers = Activations.of(config, kernels=True), range(len(specs))
    # The first block's input and the states are from before; the last block's output and states are after.
    planned = sum(counts.kept(i, r, False) + counts.features(r) for i in layers)
    return held, planned + rows * sum(state_bytes(config.model, kind) for kind in config.model.layers)


def test_kernels_keep_less_than_chunks() -> None:
    config = compose([*MODEL, "model.layers=[gated_deltanet,mamba2]"])
    [r, *_] = plan_batch(typical_batch(config, 2), 160, 1, config.sleep)
    chunks, kernels = (Activations.of(config, k) for k in (False, True))
    for layer in range(len(config.model.layers)):
        assert kernels.block(layer, r, False) < chunks.block(layer, r, False)
