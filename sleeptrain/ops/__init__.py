"""The recurrences and the short convolutions, one function each for all devices."""

from sleeptrain.ops.conv import causal_conv
from sleeptrain.ops.dispatch import gated_delta_rule, ssd
from sleeptrain.ops.dynamic_conv import dynamic_causal_conv

__all__ = ["causal_conv", "dynamic_causal_conv", "gated_delta_rule", "ssd"]
