"""Logits of whole texts, read in one call of the training loop."""

from __future__ import annotations

import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.model.hybrid import Hybrid, at_least_fp32
from sleeptrain.sleep.loop import loop_settings, run_rounds
from sleeptrain.sleep.rounds import Round, plan_batch
from sleeptrain.sleep.stop_gate import StopGate
from sleeptrain.sleep.stop_rule import stop_rule
from sleeptrain.sleep.until_stopped import RuledRounds, deciding_rounds, run_until_stopped


def whole_logits(
    model: Hybrid,
    tokens_BT: torch.Tensor,
    valid_BT: torch.Tensor,
    predicts_BT: torch.Tensor,
    sleep: SleepConfig,
    gate: StopGate | None = None,
) -> torch.Tensor:
    """The logits [P, V] at the P tokens marked in `predicts_BT`, row by row, fp32 or wider, with gradients.

    tokens_BT: int64. predicts_BT: bool. valid_BT: bool, True at the tokens of the row's only document. All other tokens
    are pads, at any position; windows are counted from the document's first token. Under `sleep.when=unlabelled` only
    windows without a marked token sleep. A stop rule decides in a forward of its own, without gradients. gate: that of
    `sleep.stop=gate`; None takes the file `sleep.stop_gate`.
    """
    order_BT, counts_B = compact(valid_BT)
    batch = _batch(tokens_BT.gather(1, order_BT), counts_B, predicts_BT.gather(1, order_BT))
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(r: Round, first: int, logits_NV: torch.Tensor, _: torch.Tensor) -> None:
        has_target = batch.targets_BT[list(r.rows), r.start : r.stop] != IGNORE
        row_N, column_N = has_target.nonzero(as_tuple=True)
        position_N = torch.tensor(r.rows)[row_N] * batch.tokens_BT.shape[1] + r.start + column_N
        parts.append((position_N[first : first + len(logits_NV)], logits_NV))

    rounds = plan_batch(batch, sleep.window, sleep.passes, sleep)
    settings = loop_settings(sleep, sleep.window, model.num_layers)
    rule = stop_rule(sleep, settings.core, gate)
    deciding = deciding_rounds(rounds)
    if rule is not None and deciding:
        stopped = run_until_stopped(model, RuledRounds(batch, deciding, settings, rule), model.empty_state())
        rounds = plan_batch(batch, sleep.window, stopped.passes_KB, sleep)
    run_rounds(model, batch, rounds, model.empty_state(), settings, keep)
    if not parts:
        return at_least_fp32(model.logits(model.embed(tokens_BT[:0, 0])))
    order = torch.argsort(torch.cat([position_N for position_N, _ in parts]))
    return torch.cat([logits_NV for _, logits_NV in parts])[order.to(tokens_BT.device)]


def compact(valid_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(order int64 [B, T]: each row's columns, valid tokens first; counts int64 [B]: the row's valid tokens)."""
    return torch.argsort((~valid_BT).to(torch.int8), dim=1, stable=True), valid_BT.sum(1)


def _batch(tokens_BT: torch.Tensor, counts_B: torch.Tensor, predicts_BT: torch.Tensor) -> Batch:
    """The batch, on the CPU. A target is 0 at every marked token, since the loss is not used."""
    tokens_BT, counts_B, predicts_BT = (t.cpu() for t in (tokens_BT, counts_B, predicts_BT))
    valid = torch.arange(tokens_BT.shape[1]) < counts_B[:, None]
    false_B = torch.zeros_like(counts_B, dtype=torch.bool)
    targets = torch.where(valid & predicts_BT, 0, IGNORE)
    return Batch(tokens_BT, targets, torch.where(valid, 0, PAD), false_B, false_B)
