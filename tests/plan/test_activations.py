"""The activations that autograd keeps, against the count of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.config.compose import compose
from sleeptrain.model import hybrid as hybrid_module
from sleeptrain.model.block import Block
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.linear import Product, computing_in, working_copies
from sleeptrain.model.mixers.attention import Attention
from sleeptrain.model.mixers.registry import mixer_spec
from sleeptrain.model.state import HARD, Recurrent
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.ops.document_attention import DocumentBounds
from sleeptrain.plan.activations import Activations
from sleeptrain.plan.layout import make_plan
from sleeptrain.plan.workload import typical_batch
from sleeptrain.sleep.curriculum import stage_shape
from sleeptrain.sleep.loop import loop_settings, run_rounds
from sleeptrain.sleep.precision import DTYPES, in_precision
from sleeptrain.sleep.rounds import plan_batch

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
    if config.sleep.recompute == "block":  # the backward makes those of one block
        counts = Activations.of(config, kernels=False)
        planned -= max(counts.block(i, r, False) for i in range(model.num_layers) for r in rounds)
        planned -= counts.copies(range(model.num_layers), head=False)
    accuracy = OF_BLOCK_INPUTS if config.sleep.recompute == "block" else ACCURACY
    assert saved_bytes(forward, model.parameters()) == pytest.approx(planned, rel=accuracy)


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
    assert step.memory[0].logits == 3 * 4 * 4 * 3000, "four rows at a time"


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


def test_kernels_keep_less_than_chunks() -> None:
    config = compose([*MODEL, "model.layers=[gated_deltanet,mamba2]"])
    [r, *_] = plan_batch(typical_batch(config, 2), 160, 1, config.sleep)
    chunks, kernels = (Activations.of(config, k) for k in (False, True))
    for layer in range(len(config.model.layers)):
        assert kernels.block(layer, r, False) < chunks.block(layer, r, False)
