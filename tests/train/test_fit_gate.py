from __future__ import annotations

import pytest
import torch

from sleeptrain.data.batch import IGNORE
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.train.fit_gate import Samples, fit_gate, gate_samples
from tests.models import random_batch, tiny_model
from tests.sleep.test_step import config


def test_samples_hold_the_loss_of_later_targets_by_further_passes() -> None:
    model, settings = tiny_model(), config(sleep__passes=3, sleep__window=4, sleep__when="unlabelled")
    batch = random_batch([[0] * 8, [0] * 8, [0] * 4 + [1] * 4])
    batch.targets_BT[:, :4] = IGNORE
    samples = gate_samples(model, [batch], settings)
    assert samples.pass_M.tolist() == [1, 1, 2, 2], "rows 0 and 1 sleep; nothing is decided after the last pass"
    assert samples.pooled_MD.shape == (4, 16) and bool((samples.change_M > 0).all())
    targets = (batch.targets_BT[:2] != IGNORE).sum(1)
    for n in (1, 2, 3):
        for row in (0, 1):
            rounds = plan_batch(batch.rows(row, row + 1), 4, n, settings.sleep)
            with torch.no_grad():
                losses, _ = run_rounds(
                    model, batch.rows(row, row + 1), rounds, model.empty_state(), LoopSettings((0, 3))
                )
            mean = (losses[1] / targets[row]).float()
            torch.testing.assert_close(samples.loss_MN[row, n - 1], mean)
            if n > 1:
                torch.testing.assert_close(samples.loss_MN[2 + row, n - 2], mean)
    assert bool(samples.loss_MN[2:, 2].isnan().all())


@pytest.mark.slow
def test_a_gate_learns_which_rows_gain_by_passes() -> None:
    """Rows whose first feature is positive lose 1 nat by two passes; others gain nothing."""
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(600, 8, generator=generator)
    hard = pooled[:, 0] > 0
    loss_MN = torch.where(hard[:, None], torch.tensor([1.0, 0.9, 0.0]), torch.tensor([0.1, 0.1, 0.1]))
    samples = Samples(pooled, torch.ones(600), torch.ones(600, dtype=torch.long), loss_MN)
    gate, explained = fit_gate(samples, seed=0)
    assert explained > 0.5
    gain_R = gate.gain(pooled, torch.ones(600), 1, 3).detach()
    assert float(gain_R[hard].mean()) > 0.35 and float(gain_R[~hard].mean()) < 0.15
