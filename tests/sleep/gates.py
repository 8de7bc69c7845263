"""Gates that no training fitted, and settings under which they choose different passes for different rows."""

from __future__ import annotations

from pathlib import Path

import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.stop_gate import StopGate, save_gate
from tests.sleep.trained import trained_decisions

PASSES = 4


def a_gate(dim: int = 16, passes: int = PASSES, change_weight: float = 8) -> StopGate:
    """A gate with gains that are mostly above 0. change_weight: how much they depend on the change of S."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gate = StopGate(dim, passes)
    with torch.no_grad():
        gate.losses[-1].bias.copy_(torch.linspace(1, 0, passes))
        gate.facts.weight[:, 0] *= change_weight
    return gate


def gated_settings(model: Hybrid, rows: list[torch.Tensor], path: Path, **sleep: object) -> SleepConfig:
    """`sleep.stop=gate` with the gate written to `path`, and a threshold between the scores of these rows."""
    save_gate(a_gate(), path)
    settings = SleepConfig(**{"passes": PASSES, "window": 4, "stop": "gate", "stop_gate": str(path), **sleep})  # type: ignore[arg-type]
    decided = trained_decisions(model, rows, settings)
    scores = sorted(score for _, of_rows in decided.scores.values() for score in of_rows)
    settings.stop_threshold = (scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2
    taken = {passes for window in trained_decisions(model, rows, settings).passes_KB for passes in window}
    assert len(taken) > 1 and settings.stop_threshold > 0, (taken, settings.stop_threshold)
    return settings
