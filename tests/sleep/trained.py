"""The training loop on texts, one document a row: the reference for all other ways to read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.loop import loop_settings, run_rounds
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.sleep.stop_rule import stop_rule
from sleeptrain.sleep.until_stopped import RuledRounds, Stopped, run_until_stopped
from tests.models import VOCABULARY


def texts(lengths: Sequence[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def trained_logits(
    model: Hybrid,
    rows: list[torch.Tensor],
    sleep: SleepConfig,
    predicts_from: int = 0,
    with_gradient: bool = False,
    vocabulary: int = VOCABULARY,
) -> list[torch.Tensor]:
    """Each row's logits [tokens, V] by the training loop; NaN before `predicts_from`, where there are no targets."""
    batch = _batch(rows, predicts_from)
    targets = batch.targets_BT
    logits = torch.full((*targets.shape, vocabulary), float("nan"), dtype=torch.float64)

    def keep(r, _first, logits_NV, _):  # type: ignore[no-untyped-def]
        at = (targets[list(r.rows), r.start : r.stop] != IGNORE).nonzero()
        logits[torch.tensor(r.rows)[at[:, 0]], r.start + at[:, 1]] = logits_NV.double()

    settings = loop_settings(sleep, sleep.window, model.num_layers)
    with torch.set_grad_enabled(with_gradient):
        rounds = plan_batch(batch, sleep.window, sleep.passes, sleep)
        if sleep.stop != "fixed":
            rounds = plan_batch(
                batch, sleep.window, trained_decisions(model, rows, sleep, predicts_from).passes_KB, sleep
            )
        run_rounds(model, batch, rounds, model.empty_state(), settings, keep)
    return [logits[b, : len(row)] for b, row in enumerate(rows)]


def trained_decisions(model: Hybrid, rows: list[torch.Tensor], sleep: SleepConfig, predicts_from: int = 0) -> Stopped:
    """The rounds that the training loop runs under the stop rule, with the passes and the scores of each row."""
    batch, settings = _batch(rows, predicts_from), loop_settings(sleep, sleep.window, model.num_layers)
    rule = stop_rule(sleep, settings.core)
    assert rule is not None
    rounds = plan_batch(batch, sleep.window, sleep.passes, sleep)
    return run_until_stopped(model, RuledRounds(batch, rounds, settings, rule), model.empty_state())


def _batch(rows: list[torch.Tensor], predicts_from: int) -> Batch:
    num_tokens = max(map(len, rows))
    tokens = torch.zeros(len(rows), num_tokens, dtype=torch.long)
    documents = torch.full_like(tokens, PAD)
    targets = torch.full_like(tokens, IGNORE)
    for b, row in enumerate(rows):
        tokens[b, : len(row)], documents[b, : len(row)], targets[b, predicts_from : len(row)] = row, 0, 0
    no = torch.zeros(len(rows), dtype=torch.bool)
    return Batch(tokens, targets, documents, no, no)
