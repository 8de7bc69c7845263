"""The recurrences and the short convolution, one function each whatever the device."""

from sleeptrain.ops.conv import causal_conv
from sleeptrain.ops.dispatch import gated_delta_rule, ssd

__all__ = ["causal_conv", "gated_delta_rule", "ssd"]
