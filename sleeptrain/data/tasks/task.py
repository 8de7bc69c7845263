"""What a task is: rows that are a function of a seed and a number, held-out rows, and what its answers are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sleeptrain.data.batch import IGNORE, Batch

# Random streams: training draws from (seed, TRAIN), all else from seed 0, so that no seed changes what is compared.
TRAIN, VALIDATION, PRIOR = range(3)


@dataclass(frozen=True)
class Answered:
    """A held-out batch with what the model made of its targets.

    predicted_BT: int64, the likeliest token at each target, IGNORE elsewhere. loss_BT: fp32, nats of each target, 0
    elsewhere.
    """

    batch: Batch
    predicted_BT: torch.Tensor
    loss_BT: torch.Tensor

    @property
    def wanted_BT(self) -> torch.Tensor:
        """Where there is a target."""
        return self.batch.targets_BT != IGNORE

    @property
    def right_BT(self) -> torch.Tensor:
        """Where the likeliest token is the target."""
        return self.wanted_BT & (self.predicted_BT == self.batch.targets_BT)


class Task(Protocol):
    """Rows to train and to be judged on. A row's document id is its number.

    name: of the held-out set. vocab_size: ids are below it. tokenizer_hash: of what makes ids of text, None where the
    ids are no text. sequence: T, tokens of a row. num_held_out: held-out rows. rows_alike: all rows have their targets
    and pads at the same places, so that each costs the same.
    """

    name: str
    vocab_size: int
    tokenizer_hash: str | None
    sequence: int
    num_held_out: int
    rows_alike: bool

    def rows(self, seed: int, first: int, count: int) -> Batch:
        """The training rows [first, first + count) of a seed; none of them is held out."""

    def held_out(self, first: int, count: int) -> Batch:
        """The held-out rows [first, first + count), the same for every seed."""

    def metrics(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """`accuracy`, the share of answers that are right by argmax, and what else the task is judged by."""

    def guessing(self) -> dict[str, float]:
        """What is reached without memory of the context, computed for the setting: the lines to compare with."""

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as a human reads them."""

    def report(self) -> dict[str, Any]:
        """What is worth logging of where the rows come from: numbers under names."""

    def identity(self) -> dict[str, Any]:
        """The settings and data that a position in the training rows belongs to."""
