"""The parameters that ZeRO-3 keeps gathered from the forward to the step."""

from __future__ import annotations

from typing import Any

from torch import nn

from sleeptrain.parallel.zero.partitions import local_shape


def keep_gathered(deepspeed: Any, call: nn.Module, model: nn.Module) -> None:
    """Keep some parameters gathered from the forward to the step: ZeRO-3 would gather them too late for the backward.

    ZeRO-3 gathers a module's weights for the backward when a gradient of a tensor that the module returned arrives. It
    does not look into the state that mixers return, and the head is applied outside its module. So the head stays
    gathered, and so does each parameter that is not a weight matrix of an innermost module. Most weights do not stay.

    call: the module that DeepSpeed calls; it calls `model`.
    """
    head = getattr(model, "head_weight", None)
    for module in model.modules():
        innermost = not any(True for _ in module.children())
        for parameter in module.parameters(recurse=False):
            if parameter is head or not innermost or len(local_shape(parameter)) != 2:
                deepspeed.zero.register_external_parameter(call, parameter)
