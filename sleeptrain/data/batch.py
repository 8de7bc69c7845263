"""The input of a training step: a batch of rows with targets and documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORE = -100  # a target without loss (the value torch's cross entropy ignores)
PAD = -1  # the document id of a pad token
PAD_TOKEN = 0  # the id in `tokens_BT` at a pad; any id would do, because nothing reads it


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens that train together.

    tokens_BT: int64, the inputs.
    targets_BT: int64, the token to predict at each position, IGNORE at positions without loss.
    documents_BT: int64, equal for the tokens of one document and different for its neighbours in the row, PAD for pads.
    carried_B: bool, the row begins inside the last document of the same row in the step before: S is carried in.
    continues_B: bool, the row's last document continues in the same row of the next step, which reads its S.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    documents_BT: torch.Tensor
    carried_B: torch.Tensor
    continues_B: torch.Tensor

    def rows(self, start: int, stop: int) -> Batch:
        """The rows [start, stop): a micro-batch."""
        return Batch(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Part:
    """The rows of a batch that one data-parallel rank reads: an equal share, in the order of ranks."""

    rank: int = 0
    ranks: int = 1

    def rows(self, total: int) -> range:
        return range(total * self.rank // self.ranks, total * (self.rank + 1) // self.ranks)
