"""A step on packed documents, with sleep: on a device as on the CPU, and without a wait of the host inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sleeptrain.ops import row_stacks
from sleeptrain.sleep.loop import loop_settings, run_rounds
from sleeptrain.sleep.precision import in_precision
from sleeptrain.sleep.rounds import plan_batch
from tests.gpu.conftest import SLOW_ON_CPU
from tests.gpu.small import MODEL, SHAPE, config_of, model_on, packed, relative, step

# The relative error of a step's gradient in the Euclidean norm. fp32 products of Triton are TF32 on a GPU: 10 bits.
# bf16 has 7, and a step has some dozens of products one after another: on the CPU the error is 0.048.
FP32, BF16 = 1e-2, 0.1


@pytest.mark.parametrize("recompute", ["none", "pass"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", FP32), ("bf16", BF16)])
def test_it_equals_fp64_on_the_cpu(
    request: pytest.FixtureRequest, place: torch.device, precision: str, tolerance: float, recompute: str
) -> None:
    if precision == "bf16" and "interpreted" in request.node.name:
        pytest.skip("Triton's interpreter computes nonsense with bf16")
    exact, model = model_on(torch.device("cpu"), torch.float64), model_on(place)
    expected, found = step(exact, packed()), step(model, packed(), precision, recompute)
    assert found.loss == pytest.approx(expected.loss, rel=tolerance / 5)
    a, b = (torch.cat([p.grad.flatten().cpu() for p in each.parameters()]) for each in (model, exact))
    assert a.dtype == torch.float32
    assert relative(a, b) < tolerance
    for layer, state in enumerate(found.state):
        if state is not None:
            assert relative(state.S_BHKV, expected.state[layer].S_BHKV) < tolerance


def test_kept_rows_add_up_as_single_products(
    request: pytest.FixtureRequest, place: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of a step whose products of few rows are computed together, which no small model does by itself."""
    if "interpreted" in request.node.name:
        pytest.skip("Triton's interpreter computes nonsense with bf16")
    found = []
    for large in (1, 2**40):
        monkeypatch.setattr(row_stacks, "LARGE", large)
        model = model_on(place)
        step(model, packed(), "bf16", "none")
        found.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    assert relative(*found) < 1e-3


@contextmanager
def no_wait(device: torch.device) -> Iterator[None]:
    """On a GPU an operation for which the host would wait raises RuntimeError inside."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("place", SLOW_ON_CPU, indirect=True)
@pytest.mark.parametrize("kind", MODEL.layers)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rounds_do_not_wait_for_the_device(place: torch.device, precision: str, kind: str) -> None:
    """Forward and backward of a step's rounds are launched ahead; only the loss is read, after them."""
    model, batch = model_on(place, layers=["gated_deltanet", kind]), packed()
    config = config_of(model, precision, "pass")
    rounds = plan_batch(batch, SHAPE.window, SHAPE.passes, config.sleep)
    assert len(rounds) > len({r.window for r in rounds}), "some window sleeps"

    def run() -> torch.Tensor:
        settings = loop_settings(config.sleep, SHAPE.window, model.num_layers)
        losses, _ = run_rounds(model, batch, rounds, model.empty_state(), settings)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        return total.detach()

    with in_precision(config.train, model):
        first = run()  # compiles and measures kernels, for which the host may wait
        with no_wait(place):
            again = run()
    assert float(again) == pytest.approx(float(first), rel=1e-3)
