"""Fits the gate of stop rules to a trained model: the model runs training rows with 1..N passes, and the gate learns
which loss followed which features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.loop import LoopSettings, loop_settings, run_rounds
from sleeptrain.sleep.precision import in_precision
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.sleep.stop_gate import StopGate
from sleeptrain.sleep.stop_rule import Passed, StopRule, state_change
from sleeptrain.sleep.until_stopped import RuledRounds, run_until_stopped
from sleeptrain.train.evaluate import Answers

STEPS, SAMPLES, RATE = 1500, 1024, 3e-3
TESTED = 8  # every eighth sample is left out of the fit, to say how well it predicts


@dataclass(frozen=True)
class Samples:
    """M decisions. After pass p only the losses of 0..N - p further passes are known; the others are NaN.

    pooled_MD, change_M, pass_M: the gate's input. loss_MN: mean loss of the row's later targets, nats.
    """

    pooled_MD: torch.Tensor
    change_M: torch.Tensor
    pass_M: torch.Tensor
    loss_MN: torch.Tensor

    def at(self, index_M: torch.Tensor) -> Samples:
        return Samples(self.pooled_MD[index_M], self.change_M[index_M], self.pass_M[index_M], self.loss_MN[index_M])


def gate_samples(model: Hybrid, batches: Iterable[Batch], config: Config) -> Samples:
    """The decisions of these batches, with the losses that each number of passes led to.

    All windows of a row have the same passes when a loss is measured. The features are those of a run with N passes.
    """
    parts: list[tuple[torch.Tensor, ...]] = []
    settings = loop_settings(config.sleep, config.sleep.window, model.num_layers, recompute="none")
    with torch.no_grad(), in_precision(config.train, model):
        for batch in batches:
            parts += _of_batch(model, batch, config, settings)
    if not parts:
        raise ValueError("no window of the batches may sleep")
    return Samples(*(torch.cat(of_all).cpu() for of_all in zip(*parts, strict=True)))


def _of_batch(model: Hybrid, batch: Batch, config: Config, settings: LoopSettings) -> list[tuple[torch.Tensor, ...]]:
    most, window = config.sleep.passes, config.sleep.window
    never, decisions = StopRule("change", -1.0, 1, settings.core), list[tuple[int, torch.Tensor, Passed]]()
    losses: list[torch.Tensor] = []
    for n in range(1, most + 1):
        rounds, answers = plan_batch(batch, window, n, config.sleep), Answers(batch)
        if n < most:
            run_rounds(model, batch, rounds, model.empty_state(), settings, answers.read)
        else:
            ruled = RuledRounds(
                batch, rounds, settings, never, answers.read,
                on_passed=lambda w, rows, passed: decisions.append((w, torch.tensor(rows), passed)),
            )  # fmt: skip
            run_until_stopped(model, ruled, model.empty_state())
        losses.append(answers.numbers()[1])
    wanted_BT, position_T = batch.targets_BT >= 0, torch.arange(batch.tokens_BT.shape[1])
    parts = list[tuple[torch.Tensor, ...]]()
    for w, rows_R, passed in decisions:
        later_RT = wanted_BT[rows_R] & (position_T >= (w + 1) * window)
        mean_NR = torch.stack([(loss_BT[rows_R] * later_RT).sum(1) for loss_BT in losses]) / later_RT.sum(1)
        loss_RN = torch.full((len(rows_R), most), torch.nan)
        loss_RN[:, : most - passed.pass_index + 1] = mean_NR[passed.pass_index - 1 :].T.float()
        kept = later_RT.any(1)
        change_R = state_change(passed.before, passed.after, settings.core).float().cpu()
        pass_R = torch.full_like(rows_R, passed.pass_index)
        parts.append((passed.pooled_RD.float().cpu()[kept], change_R[kept], pass_R[kept], loss_RN[kept]))
    return parts


def fit_gate(samples: Samples, seed: int) -> tuple[StopGate, float]:
    """The gate, and the share of the variance of the losses that it predicts on samples that it was not fitted to.

    The variance is over the known losses of one pass and number of further passes.
    """
    number = torch.arange(len(samples.pass_M))
    tested = number % TESTED == 0
    fitted = samples.at(number[~tested])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = StopGate(samples.pooled_MD.shape[1], samples.loss_MN.shape[1])
    optimizer = torch.optim.AdamW(gate.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(fitted.pass_M), (SAMPLES,), generator=generator)
        loss = _errors(gate, fitted.at(chosen)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        test = samples.at(number[tested])
        known = test.loss_MN.isfinite()
        return gate, 1 - float(_errors(gate, test).square().mean() / test.loss_MN[known].var(correction=0))


def _errors(gate: StopGate, samples: Samples) -> torch.Tensor:
    """Predicted minus measured losses, those that are known, flat."""
    known = samples.loss_MN.isfinite()
    predicted: torch.Tensor = gate(samples.pooled_MD, samples.change_M, samples.pass_M)
    return predicted[known] - samples.loss_MN[known]
