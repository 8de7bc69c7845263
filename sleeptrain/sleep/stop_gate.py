"""A gate for stop rules: a small network that predicts what further passes are worth to a row.

It reads a row's features after a pass, pooled over the tokens that sleep passes read, the change of S, and the number
of the pass, and predicts the loss of the row's later targets after 0, 1, 2, ... further passes. It is fitted to a
trained model, whose weights stay as they are, by losses that were measured with each number of passes; so it needs no
reward and no schedule, and cannot collapse onto one pass as gates that are trained with the model do (arXiv
2510.25741).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from sleeptrain.errors import ConfigError
from sleeptrain.files import write_whole

HIDDEN = 32


class StopGate(nn.Module):
    """dim: of the features. most_passes: N, the most passes that it knows.

    It stays fp32 when a model that holds it is cast, so that the same passes are chosen in every dtype of the weights.
    """

    def __init__(self, dim: int, most_passes: int) -> None:
        super().__init__()
        self.dim, self.most_passes = dim, most_passes
        self.features = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, HIDDEN))
        self.facts = nn.Linear(1 + most_passes, HIDDEN)
        self.losses = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, most_passes))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        before = {name: p.detach().clone() for name, p in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype != torch.float32:
                parameter.data = before[name].to(parameter.device)
        return self

    def forward(self, pooled_RD: torch.Tensor, change_R: torch.Tensor, pass_R: torch.Tensor) -> torch.Tensor:
        """The predicted mean loss, nats a target, after 0..N-1 further passes: fp32 [R, N].

        pooled_RD: mean features. change_R: `state_change` of the pass. pass_R: int64, the number of the pass, from 1.
        """
        passes = nn.functional.one_hot(pass_R - 1, self.most_passes).float()
        facts = torch.cat([change_R.float()[:, None], passes], dim=1)
        losses: torch.Tensor = self.losses(self.features(pooled_RD.float()) + self.facts(facts))
        return losses

    @property
    def flops(self) -> int:
        """The FLOPs of the matrix products for a row."""
        return sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    def gain(self, pooled_RD: torch.Tensor, change_R: torch.Tensor, pass_index: int, most: int) -> torch.Tensor:
        """The most that further passes are worth, [R] nats a target and pass: the best of 1..most - pass_index of them.

        It is minus infinity after the last pass.
        """
        passes = torch.full(change_R.shape, pass_index, dtype=torch.long, device=change_R.device)
        losses_RN = self(pooled_RD, change_R, passes)
        further = torch.arange(1, most - pass_index + 1, device=losses_RN.device)
        if not len(further):
            return change_R.new_full(change_R.shape, -torch.inf, dtype=torch.float32)
        gains: torch.Tensor = (losses_RN[:, :1] - losses_RN[:, 1 : len(further) + 1]) / further
        return gains.amax(1)


def save_gate(gate: StopGate, path: Path) -> None:
    """Write a gate to a safetensors file, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in gate.state_dict().items()}
    write_whole(path, save(tensors))


def load_gate(path: str, dim: int, most_passes: int, device: torch.device) -> StopGate:
    """The gate of a file. Raises ConfigError: it cannot be read, or is of another model or fewer passes."""
    gate = _read_gate(path, str(device))
    if gate.dim != dim or gate.most_passes < most_passes:
        raise ConfigError(
            f"sleep.stop_gate={path} was fitted for features of width {gate.dim} and at most {gate.most_passes} "
            f"passes, and the model has width {dim} and takes up to {most_passes}: fit one with sleeptrain calibrate "
            "--fit-gate"
        )
    return gate


@lru_cache(4)
def _read_gate(path: str, device: str) -> StopGate:
    try:
        return read_gate(path).to(device)
    except ValueError as error:
        raise ConfigError(
            f"sleep.stop_gate={path} is no gate that can be read ({error}): put the file of sleeptrain calibrate "
            "--fit-gate there, or name it"
        ) from error


def read_gate(path: str | Path) -> StopGate:
    """The gate of a file of `save_gate`, fp32 on the CPU, without gradients.

    Raises ValueError, with a reason of one line: the file cannot be read, or holds no gate.
    """
    try:
        tensors = load_file(path)
        with torch.device("meta"):  # the sizes are those of the file's tensors: nothing larger is allocated
            gate = StopGate(len(tensors["features.0.weight"]), len(tensors["losses.3.weight"]))
        gate.load_state_dict(tensors, assign=True)
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    return gate.float().requires_grad_(False)
