"""Steps with CUDA graphs on a GPU equal those without, on texts whose documents end at other places in each step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sleeptrain.model.compiled import compile_blocks
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.graphs.capture import CudaCapture
from sleeptrain.sleep.graphs.round_graphs import RoundGraphs
from sleeptrain.sleep.step import forward_backward, step_context
from tests.gpu.small import SHAPE, config_of, model_on, relative
from tests.models import random_batch

# The first documents of two rows end here; passes over the first window sleep 15 or 11 of 20 tokens.
ENDS = [(5, 6), (5, 7), (9, 10), (5, 9), (9, 11), (9, 12), (5, 6)]
# Products are added to gradients in another order, and in fp32 TF32 may multiply.
TOLERANCE = {"fp32": 1e-2, "bf16": 2e-2}


class CountedCapture(CudaCapture):
    """replays: how often graphs were launched."""

    replays = 0

    def record(self, function: Callable[[], None], pool: object) -> Callable[[], None]:
        replay = super().record(function, pool)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted


def steps(model: Hybrid, precision: str, graphs: RoundGraphs | None) -> list[tuple[float, torch.Tensor]]:
    """The loss and the whole gradient of each step; the memory goes on from step to step."""
    outcomes, carried = [], None
    for seed, (first, second) in enumerate(ENDS):
        rows = [[0] * first + [1] * (40 - first), [2] * second + [3] * (40 - second)]
        batch = random_batch(rows, seed, continues=[True, False], carried=[seed > 0, False])
        model.zero_grad(set_to_none=True)
        context = step_context(config_of(model, precision), SHAPE, model, graphs=graphs)
        result = forward_backward(context, model, batch, SHAPE, carried)
        carried = result.state
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        outcomes.append((result.loss, torch.cat(gradients).clone()))
    return outcomes


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_equal_those_without_graphs(precision: str, compiled: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    capture, models = CountedCapture(), [model_on(torch.device("cuda")) for _ in range(2)]
    for model in models if compiled else ():
        compile_blocks(model)
    expected = steps(models[0], precision, None)
    found = steps(models[1], precision, RoundGraphs(models[1], capture))
    assert capture.replays > 0
    for (a, a_gradient), (b, b_gradient) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=TOLERANCE[precision])
        assert relative(a_gradient, b_gradient) < TOLERANCE[precision]
