"""Messages of a pipeline: asynchronous sends and receives of tensors between stages."""

from __future__ import annotations

import torch
import torch.distributed as dist

from sleeptrain.parallel.pipeline.graph import AnyMessage


class Mailbox:
    """The messages of one step to and from this rank.

    group: the pipeline's process group; `peer` is a rank in it. Messages between two ranks are matched by their order,
    so both ranks must post them in the order of the schedule.
    dtype: of messages for which no other is named.
    """

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> None:
        self._group = group
        self._dtype = dtype
        self._device = device
        self._arriving: dict[AnyMessage, tuple[dist.Work, torch.Tensor]] = {}
        self._leaving: list[tuple[dist.Work, torch.Tensor]] = []

    def send(self, message: torch.Tensor, peer: int, dtype: torch.dtype | None = None) -> None:
        """Start to send a tensor. The caller must not change it before `finish`."""
        content = message.detach().to(dtype or self._dtype).contiguous()
        work = dist.isend(content, dist.get_global_rank(self._group, peer), self._group)
        assert work is not None
        self._leaving = [(w, t) for w, t in self._leaving if not w.is_completed()] + [(work, content)]

    def expect(self, message: AnyMessage, shape: tuple[int, ...], peer: int, dtype: torch.dtype | None = None) -> None:
        """Start to receive a message of this shape."""
        buffer = torch.empty(shape, dtype=dtype or self._dtype, device=self._device)
        work = dist.irecv(buffer, dist.get_global_rank(self._group, peer), self._group)
        assert work is not None
        self._arriving[message] = (work, buffer)

    def take(self, message: AnyMessage) -> torch.Tensor:
        """Wait for a message and return its content."""
        work, buffer = self._arriving.pop(message)
        work.wait()
        return buffer

    def finish(self) -> None:
        """Wait until all sends are complete."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving = []
