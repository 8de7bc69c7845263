"""A copy in host memory of the tensors of a checkpoint, which the training may change while the copy is written."""

from __future__ import annotations

import torch

from sleeptrain.checkpoint.place import Placed, Tensors, placed

ALIGNED = 16  # bytes


class Snapshot:
    """Copies tensors of a GPU through one pinned buffer, which is kept for the next copy; tensors of the CPU as usual.

    From pinned memory a GPU copies at the full speed of its link, and pinning costs more than a copy. So the buffer
    stays until a copy needs a larger one.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Tensors) -> dict[str, Placed]:
        """The tensors on the CPU, as copies. Those of a GPU are valid until the next call."""
        found = {name: placed(tensor) for name, tensor in tensors.items()}
        sizes = {name: -(-t.nbytes // ALIGNED) * ALIGNED for name, (t, _) in found.items() if is_on_gpu(t)}
        if sum(sizes.values()) > self._buffer.numel():
            self._buffer = pinned(sum(sizes.values()))
        copies, at = dict[str, Placed](), 0
        for name, (tensor, place) in found.items():
            if name not in sizes:
                copies[name] = Placed(tensor.detach().clone(), place)
                continue
            copy = self._buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor.detach(), non_blocking=True)
            copies[name] = Placed(copy, place)
            at += sizes[name]
        if sizes:
            wait()
        return copies


def is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def pinned(size: int) -> torch.Tensor:
    """A buffer of bytes that a GPU can copy into without a stop in between."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def wait() -> None:
    """Wait until the GPU has made the copies."""
    torch.cuda.synchronize()
