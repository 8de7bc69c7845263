from __future__ import annotations

import dataclasses

import pytest
import torch

from sleeptrain.config.schema import Config, TrainConfig
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights, Retained
from sleeptrain.sleep import step
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.round_layouts import retained_documents
from sleeptrain.sleep.rounds import plan_rounds, window_facts, windows_of
from sleeptrain.sleep.step import forward_backward, step_context
from tests.models import random_batch, tiny_config, tiny_model

DOCUMENTS = [[0] * 13, [0] * 5 + [1] * 8, [0] * 2 + [1] * 11, [0] * 13]
SHAPE = StepShape(passes=3, window=4, batch=4)


def config(**changes: object) -> Config:
    made = Config(model=tiny_config(), train=TrainConfig(tokens=1))
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(made, section), key, value)
    return made


def gradients_of(model: Hybrid, batch: Batch, settings: Config, **kwargs: object):
    model.zero_grad()
    result = forward_backward(step_context(settings, SHAPE, model, **kwargs), model, batch, SHAPE, None)
    return result, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(a, b) -> None:
    torch.testing.assert_close(a[0].loss, b[0].loss, rtol=1e-12, atol=1e-12)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(
            a[1][name], b[1][name], rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )
    for x, y in zip(a[0].state.layers, b[0].state.layers, strict=True):
        if x is not None:
            torch.testing.assert_close(x.S_BHKV, y.S_BHKV, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("target_share", [1.0, 0.3])
def test_micro_batches_do_not_change_the_step(size, target_share):
    """They differ in the number of targets: each loss must be divided by the targets of the full batch."""
    model, batch = tiny_model(), random_batch(DOCUMENTS, target_share=target_share, continues=[True] * 4)
    full = gradients_of(model, batch, config())
    assert_same_step(full, gradients_of(model, batch, config(train__micro_batch=size)))


def test_truncation_after_all_windows_changes_nothing():
    model, batch = tiny_model(), random_batch(DOCUMENTS)
    assert_same_step(gradients_of(model, batch, config()), gradients_of(model, batch, config(sleep__bptt_windows=4)))


def test_truncation_cuts_the_gradient_and_not_the_state():
    model, batch = tiny_model(), random_batch(DOCUMENTS, continues=[True] * 4)
    full, cut = (gradients_of(model, batch, config(sleep__bptt_windows=n)) for n in (None, 1))
    torch.testing.assert_close(full[0].loss, cut[0].loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(full[0].state[1].S_BHKV, cut[0].state[1].S_BHKV, rtol=1e-12, atol=1e-12)
    name = "blocks.1.mixer.in_proj_qkv.weight"
    assert not torch.allclose(full[1][name], cut[1][name])
    # The gradient of each window alone remains; the state before it is a constant.
    model.zero_grad()
    state = model.empty_state()
    for rounds in windows_of(plan_rounds(window_facts(batch, SHAPE.window), SHAPE.passes)):
        losses, state = run_rounds(model, batch, rounds, state.detach(), LoopSettings((0, model.num_layers)))
        if losses:  # the last window has no target
            (sum(losses.values()) / (batch.targets_BT != IGNORE).sum()).backward()
    alone = {n: p.grad for n, p in model.named_parameters()}
    for key in cut[1]:
        torch.testing.assert_close(cut[1][key], alone[key], rtol=1e-9, atol=1e-12)


def test_carried_rows_go_on_and_others_start_empty():
    model = tiny_model()
    first = random_batch([[0] * 8, [0] * 8], continues=[True, True])
    second = random_batch([[0] * 8, [0] * 8], seed=1, carried=[True, False])
    shape = StepShape(2, 4, 2)
    state = forward_backward(step_context(config(), shape, model), model, first, shape, None).state
    both = forward_backward(step_context(config(), shape, model), model, second, shape, state).loss
    alone = forward_backward(step_context(config(), shape, model), model, second, shape, None).loss
    fresh = dataclasses.replace(second, carried_B=torch.tensor([True, True]))
    assert both != alone
    assert forward_backward(step_context(config(), shape, model), model, fresh, shape, state).loss != both


def test_the_documents_of_carried_memory_are_read_once_before_the_step(monkeypatch):
    reads = []
    monkeypatch.setattr(step, "retained_documents", lambda state: reads.append(state) or retained_documents(state))
    k = torch.zeros(4, 3, 1, 1)
    carried = FastWeights((Retained(k, k, torch.arange(12).view(4, 3)),))
    fresh, going_on = (random_batch(DOCUMENTS, carried=[False, False, c, c]) for c in (False, True))
    settings = config(train__micro_batch=2)
    parts = list(step.micro_batches(going_on, SHAPE, settings, carried))
    assert reads == [carried]
    assert [part.retained_BC.tolist() for part in parts] == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    assert all(part.retained_BC is None for part in step.micro_batches(fresh, SHAPE, settings, carried))
    assert all(part.retained_BC is None for part in step.micro_batches(going_on, SHAPE, settings))
    assert reads == [carried], "without a carried row nothing is read"


def test_a_batch_without_targets_has_no_loss_and_no_gradient():
    model, batch = tiny_model(), random_batch([[0] * 8], target_share=0.0, continues=[True])
    result, gradients = gradients_of(model, batch, config(sleep__when="unlabelled"))
    assert result.loss == 0.0 and not gradients
    assert result.state[1].S_BHKV.abs().sum() > 0
