"""Rules that end the sleep of a row in a window: does another pass still change what the row remembers?

A rule scores each row after each of its passes, the wake pass included; a row whose score is at most the threshold
takes no further pass in this window. Each row is decided alone, so its rows in a batch do not matter to it.

* `change`: the relative change of S by the pass, |S - S before| / |S| (Frobenius norms over a layer's heads), the mean
  over the recurrent layers that sleep passes repeat. A converged memory has nothing more to gain (arXiv 2606.18206
  stops token loops by the convergence of their state).
* `acceleration`: how much the step of the features differs from that of the pass before, |d - e| / (|d| + |e|), where d
  is the output minus the input of the pass and e that of the pass before, over the tokens that sleep passes read: 0 for
  equal steps, at most 1. The second-order exit of arXiv 2509.23314, made relative. There is no score after the wake
  pass, which has no step before it.
* `gate`: the most that a further pass is worth by a fitted network (`stop_gate`), in nats a target and pass: the
  threshold is the price of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.model.state import FastWeights, Recurrent
from sleeptrain.sleep.stop_gate import StopGate, load_gate


@dataclass(frozen=True)
class Passed:
    """What a rule reads of some rows after a pass.

    pass_index: 1 is the wake pass.
    step_RLD: the core's output minus its input, at the tokens that sleep passes read, 0 at pads.
    pooled_RD: the mean of the core's output over these tokens, fp32 or wider.
    before, after: the memory of these rows before and after the pass.
    """

    pass_index: int
    step_RLD: torch.Tensor
    pooled_RD: torch.Tensor
    before: FastWeights
    after: FastWeights

    def rows(self, index_R: torch.Tensor) -> Passed:
        """The rows at these positions (int64)."""
        step, pooled = self.step_RLD.index_select(0, index_R), self.pooled_RD.index_select(0, index_R)
        return Passed(self.pass_index, step, pooled, self.before.rows(index_R), self.after.rows(index_R))


@dataclass(frozen=True)
class StopRule:
    """A rule with its threshold.

    kind: `change`, `acceleration` or `gate`.
    threshold: a row stops when its score is at most this.
    min_passes: no row stops earlier; the wake pass counts.
    core: the blocks [first, last) that sleep passes repeat.
    gate: the gate, on the rows' device, or the file of one.
    """

    kind: str
    threshold: float
    min_passes: int
    core: tuple[int, int]
    gate: StopGate | str = ""

    def scores(self, passed: Passed, last: Passed | None, most: int) -> torch.Tensor:
        """The score of each row, [R] fp32 or wider on the rows' device; infinite where the rule has none.

        last: the same rows after the pass before; None after the wake pass. most: the most passes of the window.
        """
        if self.kind == "gate":
            pooled = passed.pooled_RD
            gate = self._gate(pooled.shape[1], most, pooled.device)
            change_R = state_change(passed.before, passed.after, self.core)
            return gate.gain(pooled, change_R, passed.pass_index, most)
        if self.kind == "change":
            return state_change(passed.before, passed.after, self.core)
        if last is None:
            return passed.step_RLD.new_full((passed.step_RLD.shape[0],), torch.inf, dtype=torch.float32)
        return step_difference(last.step_RLD, passed.step_RLD)

    def flops(self, dim: int, most: int, device: torch.device) -> int:
        """The FLOPs of a decision on a row, matrix products alone. dim: D. most: the most passes."""
        return self._gate(dim, most, device).flops if self.kind == "gate" else 0

    def _gate(self, dim: int, most: int, device: torch.device) -> StopGate:
        return load_gate(self.gate, dim, most, device) if isinstance(self.gate, str) else self.gate

    def stops(self, scores_R: torch.Tensor, pass_index: int) -> torch.Tensor:
        """True for the rows that take no further pass after this one. A score that is no number does not stop a row."""
        return (scores_R <= self.threshold) & (pass_index >= self.min_passes)


def stop_rule(sleep: SleepConfig, core: tuple[int, int], gate: StopGate | None = None) -> StopRule | None:
    """The configured rule; None if all rows take all passes. gate: None takes that of the file `sleep.stop_gate`."""
    if sleep.stop == "fixed":
        return None
    return StopRule(sleep.stop, sleep.stop_threshold, sleep.min_passes, core, gate or sleep.stop_gate)


def state_change(before: FastWeights, after: FastWeights, core: tuple[int, int]) -> torch.Tensor:
    """The mean over the recurrent layers of the core of |S after - S before| / |S after|, [R] fp32 or wider.

    A memory that stays empty has not changed. `before` may lack a layer's state, which is then empty.
    """
    changes = []
    for old, new in list(zip(before.layers, after.layers, strict=True))[slice(*core)]:
        if isinstance(new, Recurrent):
            S = new.S_BHKV.flatten(1)
            step = S - old.S_BHKV.flatten(1) if isinstance(old, Recurrent) else S
            norm = torch.linalg.vector_norm(S, dim=1)
            changes.append(torch.linalg.vector_norm(step, dim=1) / norm.clamp(min=torch.finfo(S.dtype).tiny))
    return torch.stack(changes).mean(0)


def step_difference(last_RLD: torch.Tensor, step_RLD: torch.Tensor) -> torch.Tensor:
    """|d - d before| / (|d| + |d before|) over tokens and features, [R] fp32 or wider; 0 if both are 0."""
    last, step = (x if x.dtype == torch.float64 else x.float() for x in (last_RLD.flatten(1), step_RLD.flatten(1)))
    norms = torch.linalg.vector_norm(last, dim=1) + torch.linalg.vector_norm(step, dim=1)
    return torch.linalg.vector_norm(step - last, dim=1) / norms.clamp(min=torch.finfo(norms.dtype).tiny)


def pooled(output_RLD: torch.Tensor, valid_RL: torch.Tensor | None) -> torch.Tensor:
    """The mean of features over the valid tokens, [R, D] fp32 or wider; 0 for a row without any."""
    wide = output_RLD if output_RLD.dtype == torch.float64 else output_RLD.float()
    if valid_RL is None:
        return wide.mean(1)
    valid_RL1 = valid_RL.unsqueeze(-1)
    return torch.where(valid_RL1, wide, 0).sum(1) / valid_RL1.sum(1).clamp(min=1)
