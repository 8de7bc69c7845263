"""Model FLOPs of a step, from the round plan: what the mathematics needs, passes counted, recomputation not.

Only tokens that a round works on count (`Round.work`): pads do not, nor in a sleep pass documents that have ended.
A multiply-add is two FLOPs. Convolutions, norms and other elementwise work are left out, as is usual for MFU.
Per token and head the delta rule costs 6 K V (read S^T k, write k v^T, read S^T q) and SSD 4 K V.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from sleeptrain.config.mixers import of_mixer
from sleeptrain.config.schema import ModelConfig
from sleeptrain.sleep.rounds import Round, Stretch, round_layers

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
    mixer = of_mixer(_MIXERS, config.layers[layer], "the work")(config)
    mlp = 0 if layer in config.mixer_only else 6 * config.dim * config.ffn_dim
    return replace(mixer, features=mixer.features + mlp)


def _attention(config: ModelConfig) -> LayerFlops:
    a, d = config.attention, config.dim
    q_rows, kv_rows = a.num_heads * a.head_dim, 2 * a.num_kv_heads * a.head_dim
    return LayerFlops(2 * d * kv_rows, 2 * d * q_rows * (3 if a.gate else 2), 4 * q_rows)


def _gated_deltanet(config: ModelConfig) -> LayerFlops:
    g, d = config.gated_deltanet, config.dim
    value_dim, S = g.num_v_heads * g.head_v_dim, g.num_v_heads * g.head_k_dim * g.head_v_dim
    to_state = 2 * d * (2 * g.num_k_heads * g.head_k_dim + value_dim + 2 * g.num_v_heads) + 4 * S
    return LayerFlops(to_state, 2 * S + 4 * d * value_dim)


def _jet(config: ModelConfig) -> LayerFlops:
    j, d = config.jet, config.dim
    value_dim, S = j.num_heads * j.head_v_dim, j.num_heads * j.head_k_dim * j.head_v_dim
    kernels = 2 * j.kernel_dim * (d + j.conv_size * value_dim)
    to_state = 2 * d * (2 * j.num_heads * j.head_k_dim + value_dim + 2 * j.num_heads) + kernels + 4 * S
    return LayerFlops(to_state, 2 * S + 4 * d * value_dim)


def _mamba2(config: ModelConfig) -> LayerFlops:
    m, d = config.mamba2, config.dim
    inner, S = m.num_heads * m.head_dim, m.num_heads * m.head_dim * m.state_dim
    in_rows = 2 * inner + 2 * m.num_groups * m.state_dim + m.num_heads
    return LayerFlops(2 * d * in_rows + 2 * S, 2 * S + 2 * d * inner)


_MIXERS = {
    "attention": _attention,
    "sliding_attention": _attention,
    "gated_deltanet": _gated_deltanet,
    "jet": _jet,
    "mamba2": _mamba2,
}


def round_flops(config: ModelConfig, r: Round, core: tuple[int, int], sliding_window: int | None = None) -> int:
    """Forward FLOPs of a round over all its rows, the head left out."""
    stretches = _stretches(r, sliding_window)
    tokens = sum(s.tokens * times for s, times in stretches.items())
    layers = round_layers(r, config.layers, core, sliding_window is not None)
    total = 0
    for index in layers:
        cost = layer_flops(config, index)
        total += cost.state * tokens
        if not (r.state_only and index == layers[-1]):
            reach = _reach(config, index, r, sliding_window)
            total += cost.features * tokens
            total += cost.pair * sum(_pairs(s, reach) * times for s, times in stretches.items()) if cost.pair else 0
    return total


def _stretches(r: Round, sliding_window: int | None) -> Counter[Stretch]:
    """What a round works on, and how often; under hard eviction nothing is seen of the window before."""
    if r.work is None:
        before = sliding_window if sliding_window is not None and r.window > 0 else 0
        return Counter({Stretch(r.stop - r.start, before): len(r.rows)})
    found = Counter(chain.from_iterable(r.work))
    if sliding_window is not None:
        return found
    alone: Counter[Stretch] = Counter()
    for stretch, times in found.items():
        alone[Stretch(stretch.tokens)] += times
    return alone


def _reach(config: ModelConfig, layer: int, r: Round, sliding_window: int | None) -> int:
    """How many tokens, itself included, a token of a layer sees at most."""
    reach = r.stop - r.start if sliding_window is None else sliding_window
    return min(reach, config.attention.sliding_window) if config.layers[layer] == "sliding_attention" else reach


def _pairs(stretch: Stretch, reach: int) -> int:
    """The pairs of tokens that attend when each token sees the last `reach` of its document."""
    full = max(stretch.tokens - max(reach - stretch.before, 0), 0)  # tokens behind which lie that many
    rising = stretch.tokens - full
    return full * reach + rising * stretch.before + rising * (rising + 1) // 2


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
