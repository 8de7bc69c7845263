"""The groups of parameters that the optimizer of ZeRO updates together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from itertools import product
from typing import Any

import torch

from sleeptrain.config.schema import OptimConfig
from sleeptrain.optim.optimizers import KINDS, ParameterRole


def parameter_groups(
    roles: Mapping[str, ParameterRole],
    named_parameters: Mapping[str, torch.nn.Parameter],
    config: OptimConfig,
    narrow: Set[str],
) -> Iterator[dict[str, Any]]:
    """A group for each kind and width that there is. narrow: the names of the narrow parameters."""
    rates = {"muon": config.muon_lr, "adamw": config.adamw_lr}
    decays = {"muon": config.muon_weight_decay, "adamw": config.adamw_weight_decay}
    for kind, is_narrow in product(KINDS, (False, True)):
        names = tuple(n for n in named_parameters if roles[n].kind == kind and (n in narrow) == is_narrow)
        if names:
            yield {
                "params": [named_parameters[n] for n in names],
                "names": names,
                "kind": kind,
                "narrow": is_narrow,
                "decay": decays[kind],
                "lr": rates[kind],
                "peak_lr": rates[kind],
            }
