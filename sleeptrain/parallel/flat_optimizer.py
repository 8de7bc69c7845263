"""Muon and AdamW in one optimizer over the flat partitions that ZeRO makes of the parameters.

DeepSpeed hands its optimizer one-dimensional pieces. AdamW, momentum and look-ahead are elementwise and stay there, so
their state is sharded as ZeRO shards the weights. Only the look-ahead travels: each matrix to its owner, where it is
orthogonalised whole, once among all processes of a pipeline stage, tensor parallel shards joined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from sleeptrain.config.schema import OptimConfig
from sleeptrain.errors import ConfigError
from sleeptrain.parallel.exchange import (
    Exchange,
    Fragment,
    Holding,
    Shards,
    assign_owners,
    gather_holdings,
    newton_schulz_cost,
)
from sleeptrain.train.muon import SCALINGS, blocks_of_rows, orthogonalise
from sleeptrain.train.optim import KINDS, STATE, ParameterRole


@dataclass(frozen=True)
class Partition:
    """Tensors that are stepped together, and what lies in them.

    tensors: those that the optimizer sees. names: of the parameters that lie in it, on whichever data rank.
    fragments: of this process; their offsets count through all tensors, laid end to end.
    """

    kind: str
    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    fragments: tuple[Fragment, ...]


@dataclass(frozen=True)
class Stage:
    """The processes that hold one pipeline stage, and how a parameter is spread over them.

    group: tensor and data ranks together (None: all processes). shard: this process's tensor rank. local: the shape of
    its shard of each parameter. whole: the shape of each parameter. shards: how shards form a whole.
    """

    group: dist.ProcessGroup | None
    shard: int
    local: Mapping[str, tuple[int, ...]]
    whole: Mapping[str, tuple[int, ...]]
    shards: Shards


class FlatOptimizer(torch.optim.Optimizer):
    """The updates of `sleeptrain.train.optim.Optimizers`, in a group for each kind.

    DeepSpeed adds the norm up over pipeline stages group by group, so that all stages must have as many: each holds
    matrices for Muon and norms for AdamW. What is decayed inside a group is told by its fragments.

    Each group's `lr` is to be set before a step; `peak_lr` is the configured one. accepts: asked before each part of a
    step; where it says no, nothing changes. `bind` must be called before the
    first step, once ZeRO has replaced the parameters by their partitions. A step may be made group by group and
    partition by partition, as ZeRO does, but in the same order in all processes: it communicates.
    Raises ConfigError for an unknown `optim.muon_scaling`.
    """

    def __init__(
        self,
        roles: Mapping[str, ParameterRole],
        named_parameters: Mapping[str, torch.nn.Parameter],
        config: OptimConfig,
    ):
        if config.muon_scaling not in SCALINGS:
            raise ConfigError(f"optim.muon_scaling is {config.muon_scaling!r}; it is one of {', '.join(SCALINGS)}")
        self._roles, self._config = dict(roles), config
        self._updates: dict[torch.Tensor, _MuonUpdate] = {}
        self._decayed: dict[torch.Tensor, list[slice]] = {}  # where in each tensor, laid flat, lies what is decayed
        self.partitions: tuple[Partition, ...] = ()
        self.accepts: Callable[[], bool] = lambda: True
        super().__init__(list(_groups(roles, named_parameters, config)), {"lr": 0.0})

    def bind(self, partitions: Sequence[Partition], stage: Stage) -> None:
        """Takes over what lies where; every process of the stage must call it with partitions in the same order.

        Makes the state, all zero. Raises LayoutError when the processes' fragments do not make up whole matrices.
        """
        self.partitions = tuple(partitions)
        for partition in partitions:
            for tensor, spans in zip(partition.tensors, _decayed_spans(partition, self._roles), strict=True):
                self.state[tensor] = _new_state(partition.kind, tensor)
                self._decayed[tensor] = spans
            if partition.kind == "muon":
                self._updates[partition.tensors[0]] = _MuonUpdate(partition, stage, self._roles, self._config)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of the partitions that the groups hold at this moment."""
        if not self.accepts():
            return
        for group in self.param_groups:
            tensors = [t for t in group["params"] if t.grad is not None]
            if decayed := [t.view(-1)[span] for t in tensors for span in self._decayed[t]]:
                torch._foreach_mul_(decayed, 1 - group["lr"] * group["decay"])
            if tensors and group["kind"] == "muon":
                self._step_muon(tensors, group)
            elif tensors:
                self._step_adamw(tensors, group)

    def _step_muon(self, tensors: list[torch.Tensor], group: dict[str, Any]) -> None:
        beta = self._config.muon_momentum
        gradients = [t.grad for t in tensors if t.grad is not None]
        momenta = [self.state[t]["momentum_buffer"] for t in tensors]
        torch._foreach_lerp_(momenta, gradients, 1 - beta)
        look_ahead = torch._foreach_lerp(gradients, momenta, beta)
        updates = self._updates[tensors[0]](look_ahead)
        torch._foreach_add_(tensors, updates, alpha=-group["lr"])

    def _step_adamw(self, tensors: list[torch.Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = self._config.adamw_betas
        adamw(
            tensors,
            [t.grad for t in tensors if t.grad is not None],
            [self.state[t]["exp_avg"] for t in tensors],
            [self.state[t]["exp_avg_sq"] for t in tensors],
            [],
            [self.state[t]["step"] for t in tensors],
            fused=True,  # elementwise, so that a partition is updated as the whole would be
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=self._config.adamw_eps,
            maximize=False,
        )


class WholeOptimizer(FlatOptimizer):
    """For whole, replicated parameters (ZeRO-0), where DeepSpeed clips but tells no norm: clips and measures itself.

    A step whose gradient norm is not finite changes nothing. DeepSpeed's engine reads `overflow` and the norm from here
    as from its own optimizers.
    """

    overflow = False
    _global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        tensors = [t for group in self.param_groups for t in group["params"] if t.grad is not None]
        norm = torch.nn.utils.get_total_norm([t.grad for t in tensors if t.grad is not None])
        self.overflow = not bool(norm.isfinite())
        self._global_grad_norm = math.inf if self.overflow else float(norm)
        if self.overflow:
            return
        if self._config.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(tensors, self._config.clip_norm, norm)
        super().step()


class _MuonUpdate:
    """From the look-ahead of a partition to its update: out to the owners, through Newton-Schulz, and back."""

    def __init__(self, partition: Partition, stage: Stage, roles: Mapping[str, ParameterRole], config: OptimConfig):
        holdings = gather_holdings(Holding(stage.shard, stage.local, partition.fragments), stage.group)
        costs = {n: newton_schulz_cost(stage.whole[n], roles[n].blocks) for n in partition.names}
        owners = assign_owners(costs, len(holdings))
        self._exchange = Exchange(holdings, owners, stage.shards, dist.get_rank(stage.group), stage.group)
        self._sizes = [t.numel() for t in partition.tensors]
        device = partition.tensors[0].device
        blocks = {n: blocks_of_rows(roles[n].blocks, stage.whole[n][0], device) for n in self._exchange.owned}
        self._work = partial(orthogonalise, blocks=blocks, scaling=config.muon_scaling)

    def __call__(self, look_ahead: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        flat = torch.cat([u.reshape(-1) for u in look_ahead])
        updates = self._exchange(flat, self._work).split(self._sizes)
        return [update.view_as(u) for update, u in zip(updates, look_ahead, strict=True)]


def _groups(
    roles: Mapping[str, ParameterRole], named_parameters: Mapping[str, torch.nn.Parameter], config: OptimConfig
) -> Iterator[dict[str, Any]]:
    rates = {"muon": config.muon_lr, "adamw": config.adamw_lr}
    decays = {"muon": config.muon_weight_decay, "adamw": config.adamw_weight_decay}
    for kind in KINDS:
        names = tuple(n for n in named_parameters if roles[n].kind == kind)
        if names:
            yield {
                "params": [named_parameters[n] for n in names],
                "names": names,
                "kind": kind,
                "decay": decays[kind],
                "lr": rates[kind],
                "peak_lr": rates[kind],
            }


def _decayed_spans(partition: Partition, roles: Mapping[str, ParameterRole]) -> Iterator[list[slice]]:
    """Of each tensor of a partition, where in it lies what is decayed; a fragment may reach over several tensors."""
    decayed = [(f.offset, f.offset + f.numel) for f in partition.fragments if roles[f.name].decay]
    first = 0
    for tensor in partition.tensors:
        last = first + tensor.numel()
        inside = [(max(start, first), min(stop, last)) for start, stop in decayed]
        yield [slice(start - first, stop - first) for start, stop in inside if start < stop]
        first = last


def _new_state(kind: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """`step` is kept in fp32 whatever the weights are, as torch's AdamW does."""
    return {
        key: tensor.new_zeros((), dtype=torch.float32)
        if key == "step"
        else torch.zeros_like(tensor, requires_grad=False, memory_format=torch.contiguous_format)
        for key in sorted(STATE[kind])
    }
