"""How large memory and features are: what grows first where a loop of passes becomes unstable."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from sleeptrain.distributed.world import World
from sleeptrain.model.layout import Layout
from sleeptrain.model.state import FastWeights, Recurrent
from sleeptrain.sleep.rounds import Round
from sleeptrain.watch.progress import Phase, Progress


class Norms:
    """Root mean squares of one step, the same numbers in every layout; makes no graph.

    progress: of this process; what it runs again in a backward is not counted twice.
    """

    def __init__(self, progress: Progress) -> None:
        self._whereabouts = progress
        self._features: dict[int, torch.Tensor] = {}  # by pass: the sum of squares, and of how many numbers

    @torch.no_grad()
    def on_features(self, r: Round, layout: Layout, x_RLD: torch.Tensor) -> None:
        """Counts the features that the core leaves in a round, but for those of pads."""
        if self._whereabouts.now.phase is not Phase.FORWARD:
            return
        norm_RL = torch.linalg.vector_norm(x_RLD.detach(), dim=-1, dtype=torch.float64)
        if layout.valid_RL is not None:
            norm_RL = norm_RL[layout.valid_RL]
        found = torch.stack([norm_RL.square().sum(), norm_RL.new_tensor(norm_RL.numel() * x_RLD.shape[-1])])
        self._features[r.pass_index] = self._features.get(r.pass_index, torch.zeros_like(found)) + found

    def record(self, state: FastWeights, passes: int, world: World) -> dict[str, dict[str, float]]:
        """{"S": {"layer1": ...}, "features": {"pass1": ...}}, without what no round has left.

        state: the memory behind the step, of the rows, layers and heads that this process holds. All processes call it.
        """
        memory = {layer: _squares(own) for layer, own in enumerate(state.layers) if isinstance(own, Recurrent)}
        sums = {f"layer{layer}": memory.get(layer) for layer in range(len(state.layers))}
        sums |= {f"pass{index}": self._features.get(index) for index in range(1, passes + 1)}
        held = {name: found.tolist() for name, found in sums.items() if found is not None}
        flat = world.sum(*(value for name in sums for value in held.get(name, (0.0, 0.0))))
        pairs = zip(flat[::2], flat[1::2], strict=True)
        roots = {name: math.sqrt(total / count) for name, (total, count) in zip(sums, pairs, strict=True) if count}
        return {"S": _of("layer", roots), "features": _of("pass", roots)}


def _squares(memory: Recurrent) -> torch.Tensor:
    """The sum of squares of S over the rows that hold anything, and of how many numbers."""
    S_BN = memory.S_BHKV.detach().flatten(1)
    rows = S_BN.any(dim=1).sum()
    return torch.stack([torch.linalg.vector_norm(S_BN, dtype=torch.float64).square(), (rows * S_BN.shape[1]).double()])


def _of(kind: str, roots: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in roots.items() if name.startswith(kind)}
