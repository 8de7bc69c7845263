"""Model FLOPs of a step, from the round plan: what the mathematics needs, passes counted, recomputation not.

Only tokens that a round works on count (`Round.work`): pads do not, nor in a sleep pass documents that have ended.
What a mixer costs stands in its spec (`sleeptrain.model.mixers.spec.MixerFlops`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.model.mixers.spec import MixerFlops
from sleeptrain.sleep.rounds import Round, Stretch, round_layers

BACKWARD_AND_FORWARD = 3  # the backward of a matrix product is two products


def layer_flops(config: ModelConfig, layer: int) -> MixerFlops:
    """The cost of a block, forward."""
    mixer = block_spec(config, layer).flops()
    mlp = 0 if layer in config.mixer_only else 6 * config.dim * config.ffn_dim
    return replace(mixer, features=mixer.features + mlp)


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
    return block_spec(config, layer).reach(r.stop - r.start if sliding_window is None else sliding_window)


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
