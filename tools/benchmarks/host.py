"""The host's work for one wake round of `hybrid_2b`: CPU time of forward and backward with tensors of a few elements.

The model has the depth and the calls of `hybrid_2b` in bf16, as on a GPU, with widths so small that the arithmetic
costs next to nothing; the kernels of flash-linear-attention are replaced by functions that allocate their results. The
rest is what a host does to keep a GPU busy. It is counted on a CPU, not measured on a GPU: there the launch of a kernel
takes the place of its arithmetic. Head and loss are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks import Row
from benchmarks.timing import METHOD as METHOD
from benchmarks.timing import round_robin
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.model.compiled import compile_blocks
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.model.state import FastWeights, Recurrent
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.ops.operator import NAMESPACE, OPERATORS
from sleeptrain.sleep.inputs import RoundInputs
from sleeptrain.sleep.loop import LoopSettings, RoundContext, run_round
from sleeptrain.sleep.precision import in_precision
from sleeptrain.sleep.rounds import Round

GOAL = 1 / 3
TOKENS = 8
ROUNDS = 6
SMALL = {
    "model.vocab_size": 64,
    "model.dim": 32,
    "model.ffn_dim": 48,
    "model.attention.num_heads": 4,
    "model.attention.num_kv_heads": 2,
    "model.attention.head_dim": 8,
    "model.attention.partial_rotary_factor": 0.5,
    "model.gated_deltanet.num_k_heads": 2,
    "model.gated_deltanet.num_v_heads": 2,
    "model.gated_deltanet.head_k_dim": 8,
    "model.gated_deltanet.head_v_dim": 8,
}


def run(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    settings = [f"{name}={value}" for name, value in SMALL.items()]
    config = compose(["experiment=pretrain_2b", "run.name=r", "train.precision=bf16", "train.residual=bf16", *settings])
    with _without_kernels():
        steps = {"eager": _step(config, compiled=False), "compiled": _step(config, compiled=True)}
        for candidate in steps.values():
            candidate()  # compiles
        seconds = round_robin(steps, 3 if quick else 15)
    return [
        *(
            Row(f"a round's host time, {name}", 1e3 * value / ROUNDS, "ms", better="lower")
            for name, value in seconds.items()
        ),
        Row("compiled against eager", seconds["compiled"] / seconds["eager"], "x", GOAL, "lower"),
    ]


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Run what a GPU runs, with results of operators that are only allocated."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for operator in OPERATORS.values():
        library.impl(operator.name, operator.fake, "CPU")
    try:
        with as_on_gpu():
            yield
    finally:
        library._destroy()


def _step(config: Config, compiled: bool) -> Callable[[], None]:
    """Forward and backward of wake rounds in the middle of a text: one row, with memory that has a gradient."""
    model = Hybrid(config.model)
    model.init_weights(0)
    if compiled:
        compile_blocks(model)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    inputs = RoundInputs(ids, DocumentLayout(ids, None, None, None), ids.flatten())
    specs = [block_spec(config.model, layer) for layer in range(model.num_layers)]
    state = FastWeights(
        tuple(
            Recurrent(torch.zeros(1, *spec.state_shape, requires_grad=True)) if spec.recurrent else None
            for spec in specs
        )
    )
    context = RoundContext(model, LoopSettings((0, model.num_layers)))
    wake = Round(0, 0, TOKENS, 1, (0,), loss=True, coda=True)

    def step() -> None:
        with in_precision(config.train, model):  # once a step
            for _ in range(ROUNDS):
                x_ND = run_round(context, wake, inputs, None, state, state)[2]
                assert x_ND is not None
                x_ND.float().sum().backward()  # in place of head and loss, which are a few calls

    return step
