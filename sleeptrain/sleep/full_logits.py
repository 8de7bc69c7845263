"""Whole texts at once, every token predicted from those before it: the training loop, asked for its logits."""

from __future__ import annotations

import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.model.hybrid import Hybrid, at_least_fp32
from sleeptrain.sleep.loop import loop_settings, run_rounds
from sleeptrain.sleep.rounds import Round, plan_batch


def whole_logits(
    model: Hybrid, tokens_BT: torch.Tensor, valid_BT: torch.Tensor, predicts_BT: torch.Tensor, sleep: SleepConfig
) -> torch.Tensor:
    """The logits [P, V] of the P tokens marked in `predicts_BT`, row by row.

    They are fp32 or wider and have their gradients. valid_BT: the tokens of each row's one document; the others are
    pads, wherever they are, and its windows are counted from its first token. Under `sleep.when=unlabelled` windows
    without a mark sleep, those with one do not.
    """
    order_BT, counts_B = compact(valid_BT)
    batch = _batch(tokens_BT.gather(1, order_BT), counts_B, predicts_BT.gather(1, order_BT))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(r: Round, logits_NV: torch.Tensor, _: torch.Tensor) -> None:
        wanted = batch.targets_BT[list(r.rows), r.start : r.stop] != IGNORE
        row_N, at_N = wanted.nonzero(as_tuple=True)
        place = torch.tensor(r.rows)[row_N] * batch.tokens_BT.shape[1] + r.start + at_N
        found.append((place, logits_NV))

    rounds = plan_batch(batch, sleep.window, sleep.passes, sleep)
    settings = loop_settings(sleep, sleep.window, model.num_layers)
    run_rounds(model, batch, rounds, model.empty_state(), settings, keep)
    if not found:
        return at_least_fp32(model.logits(model.embed(tokens_BT[:0, 0])))
    by_place = torch.argsort(torch.cat([place for place, _ in found]))
    return torch.cat([logits_NV for _, logits_NV in found])[by_place.to(tokens_BT.device)]


def compact(valid_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [B, T]: each row's columns, those of its tokens first; int64 [B]: how many tokens it has)."""
    return torch.argsort((~valid_BT).to(torch.int8), dim=1, stable=True), valid_BT.sum(1)


def _batch(tokens_BT: torch.Tensor, counts_B: torch.Tensor, predicts_BT: torch.Tensor) -> Batch:
    """On the CPU. What a target is does not matter here, only where one is."""
    tokens_BT, counts_B, predicts_BT = (t.cpu() for t in (tokens_BT, counts_B, predicts_BT))
    valid = torch.arange(tokens_BT.shape[1]) < counts_B[:, None]
    no = torch.zeros_like(counts_B, dtype=torch.bool)
    targets = torch.where(valid & predicts_BT, 0, IGNORE)
    return Batch(tokens_BT, targets, torch.where(valid, 0, PAD), no, no)
