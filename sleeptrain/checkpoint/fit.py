"""Checks that a checkpoint's tensors are those of a model. Settings may name parameters that may differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from sleeptrain.checkpoint.read import Form
from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import DataError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.optim.optimizers import STATE
from sleeptrain.optim.param_groups import parameter_roles

WEIGHTS, OPTIMIZER, CARRIED = "model/", "optim/", "carried/"
SHOWN = 3


def check_resume(forms: Mapping[str, Form], config: ModelConfig) -> None:
    """Raises DataError unless the checkpoint holds exactly the model's weights and the state of its optimizers.

    A parameter that has not been stepped may lack optimizer state.
    """
    weights, kinds = _parameters(config)
    _check_names(forms, weights, "a run goes on with the model settings that it was started with")
    optimizer = {name for name in forms if name.startswith(OPTIMIZER)}
    for name, kind in kinds.items():
        keys = {f"{OPTIMIZER}{kind}/{name}/{key}" for key in STATE[kind]}
        present = keys & optimizer
        if present not in (set(), keys):
            raise DataError(f"the checkpoint has only {_some(present)} of the state of {name} in {kind}")
        optimizer -= keys
        for key in present:
            _check_form(key, forms[key], () if key.endswith("/step") else weights[name])
    if optimizer:
        raise DataError(
            f"the checkpoint has optimizer state that the model's optimizers do not keep ({_some(optimizer)}); "
            "resume with the optim settings of the checkpoint"
        )


def check_start(
    forms: Mapping[str, Form], config: ModelConfig, new: Sequence[str] = (), dropped: Sequence[str] = ()
) -> None:
    """Raises DataError unless the checkpoint's weights can begin a new run of the model.

    new: patterns of parameters that only the model may have. dropped: patterns of parameters that only the checkpoint
    may have. A pattern that matches no such parameter raises, too: it would hide a spelling mistake.
    """
    weights, _ = _parameters(config)
    saved = _saved_weights(forms)
    _check_patterns("run.init_new", new, weights.keys() - saved, "in the model but not in the checkpoint")
    _check_patterns("run.init_dropped", dropped, saved - weights.keys(), "in the checkpoint but not in the model")
    required = {name: shape for name, shape in weights.items() if name in saved or not _matches(name, new)}
    used = {WEIGHTS + n: forms[WEIGHTS + n] for n in saved if n in weights or not _matches(n, dropped)}
    _check_names(
        used, required, "name them in run.init_new (only in the model) or run.init_dropped (only in the checkpoint)"
    )


def _parameters(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """({name: shape}, {name: kind of optimizer}) of all parameters of the whole model."""
    with torch.device("meta"):
        model = Hybrid(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return shapes, {name: role.kind for name, role in parameter_roles(model).items()}


def _saved_weights(forms: Iterable[str]) -> set[str]:
    return {name.removeprefix(WEIGHTS) for name in forms if name.startswith(WEIGHTS)}


def _check_names(forms: Mapping[str, Form], expected: Mapping[str, tuple[int, ...]], way_out: str) -> None:
    saved = _saved_weights(forms)
    missing, unexpected = expected.keys() - saved, saved - expected.keys()
    if missing or unexpected:
        problems = [f"{len(missing)} of the model's parameters are missing ({_some(missing)})"] if missing else []
        problems += [f"{len(unexpected)} are not in the model ({_some(unexpected)})"] if unexpected else []
        raise DataError(f"the checkpoint does not fit the model: {' and '.join(problems)}; {way_out}")
    for name, shape in expected.items():
        _check_form(WEIGHTS + name, forms[WEIGHTS + name], shape)


def _check_form(name: str, form: Form, shape: tuple[int, ...]) -> None:
    if form != (shape, torch.float32):
        raise DataError(
            f"the checkpoint does not fit the model: {name} is {form.dtype} of shape {list(form.shape)} there, "
            f"{torch.float32} of shape {list(shape)} here; use the model settings of the checkpoint"
        )


def _check_patterns(setting: str, patterns: Sequence[str], names: Iterable[str], where: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DataError(f"{setting}: nothing that is {where} matches '{pattern}'; remove or correct it")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:SHOWN]) + (", ..." if len(ordered) > SHOWN else "")
