from __future__ import annotations

import contextlib

import pytest
import torch

from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep import precision
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.precision import Products, in_precision, proven_precision
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.sleep.step import StepResult, forward_backward, step_context
from tests.models import random_batch, tiny_config
from tests.sleep.test_step import config
from tests.train import test_trainer as runs

SHAPE = StepShape(passes=3, window=4, batch=2)


def test_bf16_keeps_the_memory_the_loss_and_the_gradients_wide():
    """bf16 rounds the products; S, the decays and the loss stay fp32, and the loss is within 1 % of fp32."""
    model = Hybrid(tiny_config())
    model.init_weights(0)
    batch = random_batch([[0] * 16, [0] * 7 + [1] * 9], continues=[True, True])
    wide = forward_backward(step_context(config(), SHAPE, model), model, batch, SHAPE, None)
    reference = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    seen = []
    model.blocks[0].mlp.up_proj.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    narrow = forward_backward(step_context(config(train__precision="bf16"), SHAPE, model), model, batch, SHAPE, None)
    assert set(seen) == {torch.bfloat16}
    assert all(s.S_BHKV.dtype == torch.float32 for s in narrow.state.layers if s is not None)
    assert abs(narrow.loss - wide.loss) < 0.01 * wide.loss and narrow.loss != wide.loss
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad - reference[name]).norm() / reference[name].norm().clamp(min=1e-6)
        assert error < 0.1, f"{name}: {error:.2f}"


def step(kind: str, of: str, watched: bool) -> tuple[StepResult, dict[str, torch.Tensor], set[torch.dtype]]:
    """A step of a fresh model with this mixer at this precision: result, gradients and, if watched, dtypes."""
    model = Hybrid(tiny_config([kind]))
    model.init_weights(0)
    batch = random_batch([[0] * 16, [0] * 7 + [1] * 9], continues=[True, True])
    settings = config(train__precision=of, sleep__recompute="pass", model__layers=[kind])
    products = Products()
    if not watched:
        result = forward_backward(step_context(settings, SHAPE, model), model, batch, SHAPE, None)
    else:
        with products:
            result = forward_backward(step_context(settings, SHAPE, model), model, batch, SHAPE, None)
    return result, {n: p.grad for n, p in model.named_parameters()}, products.dtypes


@pytest.mark.parametrize("kind", ["attention", "sliding_attention", "gated_deltanet", "jet", "mamba2"])
def test_every_product_of_a_linear_layer_is_seen_and_none_changes(kind):
    """Recurrences multiply in fp32 also under bf16, so their products are not recorded."""
    for name, dtype in precision.DTYPES.items():
        plain, gradients, _ = step(kind, name, watched=False)
        watched, others, seen = step(kind, name, watched=True)
        assert seen == {dtype}
        assert watched.loss == plain.loss
        assert all(torch.equal(gradients[n], others[n]) for n in gradients)


def test_fp32_holds_inside_another_autocast():
    model, batch = Hybrid(tiny_config()), random_batch([[0] * 8])
    rounds = plan_batch(batch, 4, 2, config().sleep)
    with torch.autocast("cpu", torch.bfloat16), Products() as products, in_precision(config().train, model):
        run_rounds(model, batch, rounds, model.empty_state(), LoopSettings((0, 3)))
    assert products.dtypes == {torch.float32}


@pytest.mark.parametrize(("of", "ran"), [("bf16", "float32"), ("fp32", "bfloat16")])
def test_a_step_in_another_precision_is_refused(of, ran):
    world = World(Mesh.single(), torch.device("cpu"))
    messages: list[str] = []
    with (
        pytest.raises(ConfigError, match=rf"train\.precision={of}, but matrix products of the first step ran in {ran}"),
        proven_precision(config(train__precision=of), world, messages.append),
    ):
        torch.ones(2, 2, dtype=getattr(torch, ran)) @ torch.ones(2, 2, dtype=getattr(torch, ran))
    assert messages == []


@pytest.mark.parametrize(("of", "ran"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_a_run_names_the_dtype_of_its_products_once(tmp_path, capfd, of, ran):
    runs.run(tmp_path, f"train.precision={of}", "train.tokens=200", "train.eval_every=0")
    output = capfd.readouterr()
    assert (output.out + output.err).count(f"the first step's matrix products ran in {ran}\n") == 1


def test_a_run_whose_precision_gets_lost_ends_before_its_first_update(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "computing_in", lambda model, dtype: contextlib.nullcontext())
    with pytest.raises(ConfigError, match=r"train\.precision=bf16, but matrix products .* ran in float32"):
        runs.run(tmp_path, "train.precision=bf16")
    assert runs.records(tmp_path) == []
