"""The two optimizers of a run as one: Muon on the body's matrices, AdamW on the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sleeptrain.config.schema import OptimConfig
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.optim.muon import SCALINGS, Blocks, Muon, blocks_of_rows

# The state tensors that each optimizer keeps for a parameter after its first step.
STATE = {"muon": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}
KINDS = tuple(STATE)

# Added to the norm in the divisor, as in torch's clip_grad_norm_ and DeepSpeed: the factor is the same in any layout.
CLIP_EPS = 1e-6


@dataclass(frozen=True)
class ParameterRole:
    """How a parameter is trained.

    kind: the optimizer, muon | adamw.
    decay: weight decay applies.
    blocks: for Muon, the rows of each matrix in the parameter (see `sleeptrain.optim.muon.Muon`); None: one matrix.
    factor: the factor on the optimizer's rate.
    frozen: the stages in which the parameter is not trained (`sleeptrain.optim.freezing`).
    """

    kind: str
    decay: bool = True
    blocks: Blocks | None = None
    factor: float = 1.0
    frozen: tuple[int, ...] = ()


class Optimizers:
    """One Muon and one AdamW over the trainable parameters, those with `requires_grad`.

    roles: the role of each trainable parameter in `named_parameters`, by name.
    Raises ConfigError, which names the parameter, if roles and parameters do not match or a role does not fit.
    """

    def __init__(
        self,
        roles: Mapping[str, ParameterRole],
        named_parameters: Mapping[str, torch.nn.Parameter],
        config: OptimConfig,
    ):
        self._parameters = _trainable(roles, named_parameters)
        self._roles = {name: roles[name] for name in self._parameters}
        self._rates = {"muon": config.muon_lr, "adamw": config.adamw_lr}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if groups := self._groups("muon", config.muon_weight_decay):
            self._optimizers["muon"] = self._make_muon(groups, config)
        if groups := self._groups("adamw", config.adamw_weight_decay):
            beta1, beta2 = config.adamw_betas
            # One kernel over all parameters. It is elementwise, so it is deterministic on the CPU and on CUDA.
            self._optimizers["adamw"] = torch.optim.AdamW(
                groups, lr=config.adamw_lr, betas=(beta1, beta2), eps=config.adamw_eps, fused=True
            )

    def _groups(self, kind: str, weight_decay: float) -> list[dict[str, Any]]:
        groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
        for name, role in self._roles.items():
            if role.kind == kind:
                groups.setdefault((role.decay, role.factor), []).append(self._parameters[name])
        return [
            {"params": parameters, "weight_decay": weight_decay if decay else 0.0, "factor": factor}
            for (decay, factor), parameters in groups.items()
        ]

    def freeze(self, stage: int) -> None:
        """From now on only parameters that are trained in this stage get gradients."""
        for name, role in self._roles.items():
            self._parameters[name].requires_grad_(stage not in role.frozen)

    def _make_muon(self, groups: list[dict[str, Any]], config: OptimConfig) -> Muon:
        if config.muon_scaling not in SCALINGS:
            raise ConfigError(f"optim.muon_scaling is {config.muon_scaling!r}; it is one of {', '.join(SCALINGS)}")
        blocks = {self._parameters[n]: r.blocks for n, r in self._roles.items() if r.blocks is not None}
        return Muon(groups, config.muon_lr, config.muon_momentum, scaling=config.muon_scaling, blocks=blocks)

    def step(self, lr_scale: float) -> None:
        """One update of every parameter that has a gradient, at `lr_scale` times the peak rates."""
        for kind, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._rates[kind] * group["factor"] * lr_scale
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """Scales all gradients together to a 2-norm of at most `max_norm`; with 0 it only computes the norm.

        Returns the norm of the gradients of both optimizers, before scaling and before any momentum: a scalar tensor on
        their device, fp32 (fp64 if a gradient is fp64). With a non-finite norm nothing is scaled.
        """
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if not gradients:
            return torch.zeros(())
        wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
        norm = torch.linalg.vector_norm(torch.stack([n.to(wide) for n in torch._foreach_norm(gradients, 2, wide)]))
        if max_norm > 0:
            # The condition stays on the device: a product with 1 is cheaper than a wait for the norm.
            scale = torch.where(norm.isfinite(), (max_norm / (norm + CLIP_EPS)).clamp(max=1.0), 1.0)
            torch._foreach_mul_(gradients, scale)
        return norm

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """{kind: {parameter name: {state name: tensor}}}; a parameter that has not been stepped has no tensors."""
        state: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        for name, role in self._roles.items():
            state[role.kind][name] = dict(self._optimizers[role.kind].state.get(self._parameters[name], {}))
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]]) -> None:
        """Loads the tensors of a `state_dict()`; copies a tensor only if it is not on its parameter's device.

        Raises DataError, and changes nothing, if kinds, names, shapes or dtypes are not those of this model.
        """
        for kind in KINDS:
            self._check_names(kind, state.get(kind, {}))
        loaded = {name: self._fit(name, role.kind, state[role.kind][name]) for name, role in self._roles.items()}
        for name, role in self._roles.items():
            optimizer_state = self._optimizers[role.kind].state
            optimizer_state.pop(self._parameters[name], None)
            if loaded[name]:
                optimizer_state[self._parameters[name]] = loaded[name]

    def _check_names(self, kind: str, saved: Mapping[str, object]) -> None:
        expected = {name for name, role in self._roles.items() if role.kind == kind}
        if differing := sorted(expected ^ set(saved)):
            name = differing[0]
            holder, other = ("model", "checkpoint") if name in expected else ("checkpoint", "model")
            raise DataError(
                f"optimizer state does not fit: {name} is trained by {kind} in the {holder} but not in the {other} "
                f"({len(differing)} such parameters); resume with the model and optim settings of the checkpoint"
            )

    def _fit(self, name: str, kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One parameter's state tensors, checked and moved to its device."""
        parameter = self._parameters[name]
        if set(tensors) not in (set(), STATE[kind]):
            raise DataError(
                f"optimizer state does not fit: {name} has {', '.join(sorted(tensors))} where {kind} keeps "
                f"{', '.join(sorted(STATE[kind]))}; the checkpoint is not one of these optimizers"
            )
        for key, value in tensors.items():
            actual = (tuple(value.shape), value.dtype)
            expected = ((), torch.float32) if key == "step" else (tuple(parameter.shape), parameter.dtype)
            if actual != expected:
                raise DataError(
                    f"optimizer state does not fit: {key} of {name} is {actual[1]} of shape {actual[0]} in "
                    f"the checkpoint, {expected[1]} of shape {expected[0]} in the model; resume with the checkpoint's "
                    "settings"
                )
        return {key: value.detach().to(parameter.device) for key, value in tensors.items()}


def _trainable(
    roles: Mapping[str, ParameterRole], named_parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.nn.Parameter]:
    """The parameters to train by name, each checked against its role."""
    names: dict[torch.nn.Parameter, str] = {}
    for name, parameter in named_parameters.items():
        if names.setdefault(parameter, name) != name:
            raise ConfigError(f"{names[parameter]} and {name} are one parameter; list it under one name")
        if parameter.requires_grad:
            _check_role(name, parameter, roles.get(name))
    if unknown := sorted(set(roles) - set(named_parameters)):
        raise ConfigError(f"{unknown[0]} has a role but the model has no such parameter")
    return {name: p for name, p in named_parameters.items() if p.requires_grad}


def _check_role(name: str, parameter: torch.nn.Parameter, role: ParameterRole | None) -> None:
    if role is None:
        raise ConfigError(f"{name} is trainable but has no role; give it one of {', '.join(KINDS)}")
    if role.kind not in KINDS:
        raise ConfigError(f"{name} has the role {role.kind!r}; it is one of {', '.join(KINDS)}")
    if role.kind == "muon" and parameter.ndim != 2:
        raise ConfigError(f"{name} of shape {tuple(parameter.shape)} is no matrix; train it by adamw")
    if role.kind == "adamw" and role.blocks is not None:
        raise ConfigError(f"{name} has blocks, which only muon orthogonalises; drop them or train it by muon")
    if role.blocks is not None:
        try:
            blocks_of_rows(role.blocks, parameter.shape[0], parameter.device)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
