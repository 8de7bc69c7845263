"""Model FLOPs of a step, from the round plan: what the mathematics needs, passes counted, recomputation not.

A multiply-add is two FLOPs. Convolutions, norms and other elementwise work are left out, as is usual for MFU.
Per token and head the delta rule costs 6 K V (read S^T k, write k v^T, read S^T q) and SSD 4 K V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sleeptrain.config.ranges import ATTENTION_MIXERS
from sleeptrain.config.schema import ModelConfig
from sleeptrain.sleep.rounds import Round, round_layers

BACKWARD_AND_FORWARD = 3  # the backward of a matrix product is two products


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOPs of one block for one token: to leave its state, and to give its features besides; and for a pair of
    tokens that attend."""

    state: int
    features: int
    pair: int = 0


def layer_flops(config: ModelConfig, layer: int) -> LayerFlops:
    """The cost of a block."""
    mixer = _mixer_flops(config, config.layers[layer])
    mlp = 0 if layer in config.mixer_only else 6 * config.dim * config.ffn_dim
    return replace(mixer, features=mixer.features + mlp)


def _mixer_flops(config: ModelConfig, kind: str) -> LayerFlops:
    d = config.dim
    if kind in ATTENTION_MIXERS:
        a = config.attention
        q_rows, kv_rows = a.num_heads * a.head_dim, 2 * a.num_kv_heads * a.head_dim
        return LayerFlops(2 * d * kv_rows, 2 * d * q_rows * (3 if a.gate else 2), 4 * q_rows)
    if kind == "gated_deltanet":
        g = config.gated_deltanet
        value_dim, S = g.num_v_heads * g.head_v_dim, g.num_v_heads * g.head_k_dim * g.head_v_dim
        to_state = 2 * d * (2 * g.num_k_heads * g.head_k_dim + value_dim + 2 * g.num_v_heads) + 4 * S
        return LayerFlops(to_state, 2 * S + 4 * d * value_dim)
    if kind == "jet":
        j = config.jet
        value_dim, S = j.num_heads * j.head_v_dim, j.num_heads * j.head_k_dim * j.head_v_dim
        kernels = 2 * j.kernel_dim * (d + j.conv_size * value_dim)
        to_state = 2 * d * (2 * j.num_heads * j.head_k_dim + value_dim + 2 * j.num_heads) + kernels + 4 * S
        return LayerFlops(to_state, 2 * S + 4 * d * value_dim)
    m = config.mamba2
    inner, S = m.num_heads * m.head_dim, m.num_heads * m.head_dim * m.state_dim
    in_rows = 2 * inner + 2 * m.num_groups * m.state_dim + m.num_heads
    return LayerFlops(2 * d * in_rows + 2 * S, 2 * S + 2 * d * inner)


def attending_pairs(config: ModelConfig, layer: int, r: Round, sliding_window: int | None) -> int:
    """The pairs of tokens that attend in a row of a round."""
    length = r.stop - r.start
    reach = length if sliding_window is None else sliding_window
    if config.layers[layer] == "sliding_attention":
        reach = min(reach, config.attention.sliding_window)
    if sliding_window is not None and r.window > 0:
        return length * reach
    reach = min(reach, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def round_flops(config: ModelConfig, r: Round, core: tuple[int, int], sliding_window: int | None = None) -> int:
    """Forward FLOPs of a round over all its rows, the head left out."""
    length = r.stop - r.start
    layers = round_layers(r, config.layers, core, sliding_window is not None)
    total = 0
    for index in layers:
        cost = layer_flops(config, index)
        total += cost.state * length
        if not (r.state_only and index == layers[-1]):
            total += cost.features * length + cost.pair * attending_pairs(config, index, r, sliding_window)
    return total * len(r.rows)


def step_flops(
    config: ModelConfig,
    rounds: Sequence[Round],
    num_targets: int,
    core: tuple[int, int],
    sliding_window: int | None = None,
) -> int:
    """FLOPs of a training step: forward and backward of its rounds, and of the head where there is a target."""
    head = 2 * config.dim * config.vocab_size * num_targets
    return BACKWARD_AND_FORWARD * (head + sum(round_flops(config, r, core, sliding_window) for r in rounds))
