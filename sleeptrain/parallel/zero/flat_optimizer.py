"""Muon and AdamW in one optimizer over the flat partitions into which ZeRO cuts the parameters.

DeepSpeed gives its optimizer one-dimensional partitions. AdamW, momentum and look-ahead are elementwise and run on
them, so their state is sharded as the weights are. Only the look-ahead is sent: each matrix has one owner among the
processes of a pipeline stage, which joins it (tensor parallel shards, too) and orthogonalises it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from sleeptrain.config.schema import OptimConfig
from sleeptrain.errors import ConfigError
from sleeptrain.optim.muon import SCALINGS, blocks_of_rows, orthogonalise
from sleeptrain.optim.optimizers import STATE, ParameterRole
from sleeptrain.parallel.zero.groups import parameter_groups
from sleeptrain.parallel.zero.matrix_exchange import (
    Exchange,
    Fragment,
    Holding,
    Shards,
    assign_owners,
    gather_holdings,
    newton_schulz_cost,
)


@dataclass(frozen=True)
class Partition:
    """Tensors that one optimizer step updates together, and the fragments of parameters in them.

    kind: `muon` or `adamw`.
    names: the parameters with fragments in this partition, on any data rank.
    tensors: the tensors that the optimizer sees.
    fragments: this process's fragments; offsets count through all tensors, laid end to end.
    """

    kind: str
    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    fragments: tuple[Fragment, ...]


class UpdateRule(NamedTuple):
    """factor: multiplies the group's learning rate. frozen: the stages in which there is no update."""

    factor: float
    frozen: tuple[int, ...]


# Spans of a flattened tensor, by update rule.
Spans = dict[UpdateRule, list[slice]]
WHOLE = slice(None)


@dataclass(frozen=True)
class ModelStage:
    """The processes that together hold the state of one pipeline stage, and the shards of its parameters.

    group: these processes, `Mesh.state` (None: all processes).
    shard: this process's tensor rank.
    local: the shape of this process's shard of each parameter.
    whole: the shape of each full parameter.
    shards: how shards form a full parameter.
    """

    group: dist.ProcessGroup | None
    shard: int
    local: Mapping[str, tuple[int, ...]]
    whole: Mapping[str, tuple[int, ...]]
    shards: Shards


class FlatOptimizer(torch.optim.Optimizer):
    """The updates of `sleeptrain.optim.optimizers.Optimizers`, with a parameter group for each kind and width.

    The norm is summed over pipeline stages kind by kind, so all stages must have the same kinds: each stage has
    matrices for Muon and norms for AdamW. Within a group, the fragments decide on decay, freezing and rate.

    Set each group's `lr` before a step; `peak_lr` is the configured rate.
    accepts: called before each part of a step; if it returns False, nothing changes.
    frozen_stage: the current stage of `sleeptrain.optim.freezing`; gradients of its frozen parameters must be zero.
    Call `bind` before the first step, after ZeRO has replaced the parameters by partitions. A step may run group by
    group and partition by partition, as ZeRO does, but in the same order in all processes: it communicates.
    Raises ConfigError for an unknown `optim.muon_scaling`.
    """

    def __init__(
        self,
        roles: Mapping[str, ParameterRole],
        named_parameters: Mapping[str, torch.nn.Parameter],
        config: OptimConfig,
        narrow: Set[str] = frozenset(),
    ):
        """narrow: the names of the parameters that get groups of their own."""
        if config.muon_scaling not in SCALINGS:
            raise ConfigError(f"optim.muon_scaling is {config.muon_scaling!r}; it is one of {', '.join(SCALINGS)}")
        self.roles, self._config = dict(roles), config
        self._updates: dict[torch.Tensor, _MuonUpdate] = {}
        self._decayed: dict[torch.Tensor, Spans] = {}  # the spans of each tensor that have weight decay
        self._trained: dict[torch.Tensor, Spans] = {}
        self.partitions: tuple[Partition, ...] = ()
        self.accepts: Callable[[], bool] = lambda: True
        self.frozen_stage = 0
        super().__init__(list(parameter_groups(roles, named_parameters, config, narrow)), {"lr": 0.0})

    def bind(self, partitions: Sequence[Partition], stage: ModelStage) -> None:
        """Set the partitions and make the state, all zero.

        All processes of the stage call it together, with partitions in the same order. Raises LayoutError if the
        processes' fragments do not form full matrices.
        """
        self.partitions = tuple(partitions)
        for partition in partitions:
            rules = {_update_rule(self.roles[name]) for name in partition.names}
            decayed = {name for name in partition.names if self.roles[name].decay}
            trained = _spans(partition, self.roles, set(partition.names))
            for tensor, *spans in zip(partition.tensors, _spans(partition, self.roles, decayed), trained, strict=True):
                self.state[tensor] = _new_state(partition.kind, tensor, rules)
                self._decayed[tensor], self._trained[tensor] = spans
                if len(rules) == 1:
                    self._trained[tensor] = {rule: [WHOLE] for rule in rules}
            if partition.kind == "muon":
                self._updates[partition.tensors[0]] = _MuonUpdate(partition, stage, self.roles, self._config)

    def is_frozen(self, name: str) -> bool:
        """True if the parameter is frozen in the current stage."""
        return self.frozen_stage in self.roles[name].frozen

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the partitions that are in the groups at this call."""
        if not self.accepts():
            return
        for group in self.param_groups:
            tensors = [t for t in group["params"] if t.grad is not None]
            for (factor, _), (decayed,) in self._in_force(self._decayed, tensors, tensors):
                torch._foreach_mul_(decayed, 1 - group["lr"] * factor * group["decay"])
            if tensors and group["kind"] == "muon":
                self._step_muon(tensors, group)
            elif tensors:
                self._step_adamw(tensors, group)

    def _in_force(
        self, spans: Mapping[torch.Tensor, Spans], tensors: Sequence[torch.Tensor], *lists: Sequence[torch.Tensor]
    ) -> Iterator[tuple[UpdateRule, list[list[torch.Tensor]]]]:
        """For each update rule that is not frozen: the rule, and for each of `lists` the views of the rule's spans.

        Each of `lists` has a tensor for each of `tensors`, of the same shape.
        """
        for rule in dict.fromkeys(rule for t in tensors for rule in spans[t]):
            if self.frozen_stage not in rule.frozen:
                views = [
                    [
                        x if span == WHOLE else x.reshape(-1)[span]
                        for t, x in zip(tensors, values, strict=True)
                        for span in spans[t].get(rule, ())
                    ]
                    for values in lists
                ]
                yield rule, views

    def _step_muon(self, tensors: list[torch.Tensor], group: dict[str, Any]) -> None:
        beta = self._config.muon_momentum
        gradients = [t.grad for t in tensors if t.grad is not None]
        momenta = [self.state[t]["momentum_buffer"] for t in tensors]
        for _, (momentum, gradient) in self._in_force(self._trained, tensors, momenta, gradients):
            torch._foreach_lerp_(momentum, gradient, 1 - beta)
        look_ahead = torch._foreach_lerp(gradients, momenta, beta)
        updates = self._updates[tensors[0]](look_ahead)
        for (factor, _), (weights, update) in self._in_force(self._trained, tensors, tensors, updates):
            torch._foreach_add_(weights, update, alpha=-group["lr"] * factor)

    def _step_adamw(self, tensors: list[torch.Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = self._config.adamw_betas
        gradients = [t.grad for t in tensors if t.grad is not None]
        averages = [[self.state[t][key] for t in tensors] for key in ("exp_avg", "exp_avg_sq")]
        in_force = self._in_force(self._trained, tensors, tensors, gradients, *averages)
        for (factor, frozen), (weights, gradient, average, square) in in_force:
            num_steps = self.state[tensors[0]][step_key(frozen)]
            adamw(
                weights,
                gradient,
                average,
                square,
                [],
                [num_steps.clone() for _ in weights],
                fused=True,  # elementwise: a partition gets the same update as in the full tensor
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"] * factor,
                weight_decay=0.0,
                eps=self._config.adamw_eps,
                maximize=False,
            )
        for tensor in tensors:
            for key, count in self.state[tensor].items():
                if key.startswith("step") and str(self.frozen_stage) not in key.split()[1:]:
                    count += 1


class WholeOptimizer(FlatOptimizer):
    """For replicated parameters (ZeRO-0), where DeepSpeed reports no norm: it computes the norm and clips itself.

    A step whose gradient norm is not finite changes nothing. DeepSpeed's engine reads `overflow` and the norm from this
    object, as from its own optimizers.
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
    """Turns the look-ahead of a partition into its update: the owners of the matrices run Newton-Schulz on them."""

    def __init__(
        self, partition: Partition, stage: ModelStage, roles: Mapping[str, ParameterRole], config: OptimConfig
    ):
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


def _update_rule(role: ParameterRole) -> UpdateRule:
    return UpdateRule(role.factor, role.frozen)


def _spans(partition: Partition, roles: Mapping[str, ParameterRole], names: Set[str]) -> Iterator[Spans]:
    """Yield for each tensor of a partition the spans of the named parameters. A fragment may span several tensors."""
    first = 0
    for tensor in partition.tensors:
        last, spans = first + tensor.numel(), Spans()
        for f in partition.fragments:
            start, stop = max(f.offset, first) - first, min(f.offset + f.numel, last) - first
            if f.name in names and start < stop:
                spans.setdefault(_update_rule(roles[f.name]), []).append(slice(start, stop))
        yield spans
        first = last


def step_key(frozen: tuple[int, ...]) -> str:
    """The key of a tensor's state for the number of steps of parameters that are frozen in these stages."""
    return " ".join(["step", *map(str, frozen)])


def _new_state(kind: str, tensor: torch.Tensor, rules: Iterable[UpdateRule]) -> dict[str, torch.Tensor]:
    """The state of a tensor, all zero. Step counts are fp32 for any weight dtype, as in torch's AdamW."""
    state = {
        key: torch.zeros_like(tensor, requires_grad=False, memory_format=torch.contiguous_format)
        for key in sorted(STATE[kind] - {"step"})
    }
    if "step" in STATE[kind]:
        state |= {step_key(rule.frozen): tensor.new_zeros((), dtype=torch.float32) for rule in rules}
    return state
