"""The interface of a task: rows as a function of a seed and a number, held-out rows, and the scores of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sleeptrain.data.batch import IGNORE, Batch

# Random streams. Training draws from (seed, TRAIN), all else from seed 0, so that all seeds are scored on equal rows.
TRAIN, VALIDATION, PRIOR = range(3)


@dataclass(frozen=True)
class Answered:
    """A held-out batch with the model's predictions.

    predicted_BT: int64, the most likely token at each target, IGNORE elsewhere.
    loss_BT: fp32, nats of each target, 0 elsewhere.
    passes_BK: fp32, where a stop rule ends sleep: the passes of each row in each window, the wake pass counted, NaN
        where it may not sleep; None without a rule.
    """

    batch: Batch
    predicted_BT: torch.Tensor
    loss_BT: torch.Tensor
    passes_BK: torch.Tensor | None = None

    @property
    def passes_B(self) -> torch.Tensor | None:
        """fp32: the mean passes of each row's windows that may sleep, NaN without such windows; None without a rule."""
        return None if self.passes_BK is None else self.passes_BK.nanmean(1)

    @property
    def wanted_BT(self) -> torch.Tensor:
        """bool: positions with a target."""
        return self.batch.targets_BT != IGNORE

    @property
    def right_BT(self) -> torch.Tensor:
        """bool: positions at which the most likely token is the target."""
        return self.wanted_BT & (self.predicted_BT == self.batch.targets_BT)


class Task(Protocol):
    """Rows for training and evaluation. A row's document id is its number.

    name: name of the held-out set.
    vocab_size: ids are below it.
    tokenizer_hash: hash of the tokenizer, None if the ids are no text.
    sequence: T, tokens of a row.
    num_held_out: number of held-out rows.
    rows_alike: True if all rows have targets and pads at the same positions, and so the same cost.
    """

    name: str
    vocab_size: int
    tokenizer_hash: str | None
    sequence: int
    num_held_out: int
    rows_alike: bool

    def rows(self, seed: int, first: int, count: int) -> Batch:
        """The training rows [first, first + count) of a seed; none has held-out content."""

    def held_out(self, first: int, count: int) -> Batch:
        """The held-out rows [first, first + count), the same for every seed."""

    def metrics(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """`accuracy`, the share of answers that are right by argmax, and the other scores of the task."""

    def guessing(self) -> dict[str, float]:
        """Baselines: the scores of models without memory of the context, computed from the settings."""

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as readable text."""

    def report(self) -> dict[str, Any]:
        """Values about the origin of the rows for the log, by name."""

    def identity(self) -> dict[str, Any]:
        """The settings and data that determine the rows; a saved position holds them."""
