"""The sizes of memory and features. They grow first when a loop of passes becomes unstable."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from sleeptrain.distributed.world import World
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.state import FastWeights, Recurrent
from sleeptrain.sleep.rounds import Round
from sleeptrain.watch.progress import Phase, Progress


class Norms:
    """Root mean squares of one step, the same numbers in every parallel layout. Makes no graph.

    progress: of this process. Its phase shows rounds that run again in a backward, which are not counted twice.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._features: dict[int, torch.Tensor] = {}  # by pass: (sum of squares, count of numbers), float64

    @torch.no_grad()
    def on_features(self, r: Round, layout: DocumentLayout, x_RLD: torch.Tensor) -> None:
        """Add the features [R, L, D] that the core outputs in a round, pads excluded."""
        if self._progress.now.phase is not Phase.FORWARD:
            return
        norm_RL = torch.linalg.vector_norm(x_RLD.detach(), dim=-1, dtype=torch.float64)
        if layout.valid_RL is not None:
            norm_RL = norm_RL[layout.valid_RL]
        sums = torch.stack([norm_RL.square().sum(), norm_RL.new_tensor(norm_RL.numel() * x_RLD.shape[-1])])
        self._features[r.pass_index] = self._features.get(r.pass_index, torch.zeros_like(sums)) + sums

    def record(self, state: FastWeights, passes: int, world: World) -> dict[str, dict[str, float]]:
        """{"S": {"layer1": ...}, "features": {"pass1": ...}}, without layers and passes that have no numbers.

        state: the memory after the step, of the rows, layers and heads of this process. All processes call it.
        """
        squares = {
            layer: _squares(memory) for layer, memory in enumerate(state.layers) if isinstance(memory, Recurrent)
        }
        sums = {f"layer{layer}": squares.get(layer) for layer in range(len(state.layers))}
        sums |= {f"pass{index}": self._features.get(index) for index in range(1, passes + 1)}
        local = {name: values.tolist() for name, values in sums.items() if values is not None}
        flat = world.sum(*(value for name in sums for value in local.get(name, (0.0, 0.0))))
        pairs = zip(flat[::2], flat[1::2], strict=True)
        roots = {name: math.sqrt(total / count) for name, (total, count) in zip(sums, pairs, strict=True) if count}
        return {"S": _with_prefix("layer", roots), "features": _with_prefix("pass", roots)}


def _squares(memory: Recurrent) -> torch.Tensor:
    """(sum of squares of S, count of numbers) over the rows whose S is not zero, float64."""
    S_BN = memory.S_BHKV.detach().flatten(1)
    rows = S_BN.any(dim=1).sum()
    return torch.stack([torch.linalg.vector_norm(S_BN, dtype=torch.float64).square(), (rows * S_BN.shape[1]).double()])


def _with_prefix(prefix: str, roots: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in roots.items() if name.startswith(prefix)}
