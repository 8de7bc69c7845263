"""Batches for processes that train on the same rows: one process reads a batch and broadcasts it to the others."""

from __future__ import annotations

import torch
import torch.distributed as dist

from sleeptrain.data.ahead import Cancelled
from sleeptrain.data.batch import Batch
from sleeptrain.data.source import Source
from sleeptrain.errors import PeerError

READ, FAILED, CANCELLED = 0, 1, 2


class SharedReading:
    """The training batches of `source` for all processes of `group`. The first process of the group reads them.

    Every process holds the source and knows its position; only the first process opens data for a batch. All processes
    must call `batch` together. If the first process fails, it raises its error and the others raise PeerError; if it is
    cancelled, all raise Cancelled.

    device: device of the tensors that the group's backend sends (the CPU for gloo).
    """

    def __init__(self, source: Source, group: dist.ProcessGroup, device: torch.device) -> None:
        self._source = source
        self._group = group
        self._device = device
        self._reader = dist.get_global_rank(group, 0)
        self._reads = dist.get_rank() == self._reader

    def batch(self, rows: int) -> Batch:
        """The next batch, on the CPU: the rows of this process's part, as in `source.batch`."""
        size = (len(self._source.part.rows(rows)), self._source.sequence)
        if not self._reads:
            self._source.skip(rows)
            message = self._broadcast(_message(*size))
            if message[0] == CANCELLED:
                raise Cancelled
            if message[0] == FAILED:
                raise PeerError(f"rank {self._reader} could not read the batch of this rank; its message says why")
            return _unpack(message, *size)
        try:
            batch = self._source.batch(rows)
        except Exception as error:
            self._broadcast(_message(*size).fill_(CANCELLED if isinstance(error, Cancelled) else FAILED))
            raise
        self._broadcast(_pack(batch))
        return batch

    def _broadcast(self, message: torch.Tensor) -> torch.Tensor:
        message = message.to(self._device)
        dist.broadcast(message, self._reader, self._group)
        return message.cpu()


def _message(num_rows: int, sequence: int) -> torch.Tensor:
    """An empty message, int64: one status (READ, FAILED or CANCELLED), then the values of a batch."""
    return torch.full((1 + num_rows * (3 * sequence + 2),), READ)


def _pack(batch: Batch) -> torch.Tensor:
    columns = [
        batch.tokens_BT,
        batch.targets_BT,
        batch.documents_BT,
        batch.carried_B[:, None],
        batch.continues_B[:, None],
    ]
    return torch.cat([torch.tensor([READ]), torch.cat(columns, dim=1).flatten()])


def _unpack(message: torch.Tensor, num_rows: int, sequence: int) -> Batch:
    columns = message[1:].view(num_rows, -1).split([sequence, sequence, sequence, 1, 1], dim=1)
    tokens_BT, targets_BT, documents_BT = (column.contiguous() for column in columns[:3])
    return Batch(tokens_BT, targets_BT, documents_BT, *(column.squeeze(1).bool() for column in columns[3:]))
