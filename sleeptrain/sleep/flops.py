"""Model FLOPs of a step, from the round plan: all passes are counted, recomputation is not. Where a stop rule decides
in a forward of its own, that counts, too: it is no repetition of the rounds that are trained.

Only tokens that a round works on count (`Round.work`): pads do not, and in a sleep pass ended documents do not. The
cost of a mixer is in its spec (`sleeptrain.model.mixers.spec.MixerFlops`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.model.mixers.spec import MixerFlops
from sleeptrain.sleep.rounds import Round, Stretch, round_layers, windows_of

BACKWARD_AND_FORWARD = 3  # the backward of a matrix product is two products


def layer_flops(config: ModelConfig, layer: int) -> MixerFlops:
    """The forward FLOPs of a block."""
    mixer = block_spec(config, layer).flops()
    mlp = 0 if layer in config.mixer_only else 6 * config.dim * config.ffn_dim
    return replace(mixer, features=mixer.features + mlp)


def round_flops(
    config: ModelConfig,
    r: Round,
    core: tuple[int, int],
    sliding_window: int | None = None,
    only: range | None = None,
) -> int:
    """Forward FLOPs of a round over all its rows, without the head. only: count these blocks; None: all."""
    stretches = _stretches(r, sliding_window)
    tokens = sum(s.tokens * times for s, times in stretches.items())
    layers = round_layers(r, config.layers, core, sliding_window is not None)
    end = layers[-1:] if r.state_only else range(0)
    full = layers[: len(layers) - len(end)]
    total = sum(layer_flops(config, index).state * tokens for index in _within(end, only))
    for index, times in _alike(config, _within(full, only)).items():
        cost, reach = layer_flops(config, index), _reach(config, index, r, sliding_window)
        pairs = sum(_pairs(s, reach) * times for s, times in stretches.items()) if cost.pair else 0
        total += times * ((cost.state + cost.features) * tokens + cost.pair * pairs)
    return total


def _within(layers: range, only: range | None) -> range:
    return layers if only is None else range(max(layers.start, only.start), min(layers.stop, only.stop))


def _alike(config: ModelConfig, layers: range) -> Counter[int]:
    """How often each kind of block is among the layers, by the first block of that kind."""
    first: dict[tuple[str, bool], int] = {}
    return Counter(first.setdefault((config.layers[i], i in config.mixer_only), i) for i in layers)


def _stretches(r: Round, sliding_window: int | None) -> Counter[Stretch]:
    """The stretches of a round, each with its count. Under hard eviction the previous window is not seen."""
    if r.work is None:
        before = sliding_window if sliding_window is not None and r.window > 0 and not r.skip else 0
        return Counter({Stretch(r.length, before): len(r.rows)})
    stretches = Counter(chain.from_iterable(r.work))
    if sliding_window is not None:
        return stretches
    without_before: Counter[Stretch] = Counter()
    for stretch, times in stretches.items():
        without_before[Stretch(stretch.tokens)] += times
    return without_before


def _reach(config: ModelConfig, layer: int, r: Round, sliding_window: int | None) -> int:
    """The most tokens that a token of a layer sees, itself included."""
    return block_spec(config, layer).reach(r.stop - r.start if sliding_window is None else sliding_window)


def _pairs(stretch: Stretch, reach: int) -> int:
    """The number of attending pairs if each token sees the last `reach` tokens of its document."""
    full = max(stretch.tokens - max(reach - stretch.before, 0), 0)  # tokens that see `reach` tokens
    rising = stretch.tokens - full
    return full * reach + rising * stretch.before + rising * (rising + 1) // 2


def step_flops(
    config: ModelConfig,
    rounds: Sequence[Round],
    num_targets: int,
    core: tuple[int, int],
    sliding_window: int | None = None,
) -> int:
    """FLOPs of a training step: forward and backward of its rounds, and of the head at each target.

    The core has no backward in rounds whose results are read without gradients only.
    """
    head = 2 * config.dim * config.vocab_size * num_targets
    forward = head + forward_flops(config, rounds, core, sliding_window)
    forward_only = forward_flops(config, rounds_without_backward(rounds), core, sliding_window, range(*core))
    return BACKWARD_AND_FORWARD * forward - (BACKWARD_AND_FORWARD - 1) * forward_only


def rounds_without_backward(rounds: Sequence[Round]) -> list[Round]:
    """The rounds that predict nothing, and whose rows all have a later pass that is detached (`sleep.bptt_passes`)."""
    found = list[Round]()
    for group in windows_of(rounds):
        detached = {b: r.pass_index for r in group if r.detached for b in r.rows}
        found += [r for r in group if not r.loss and all(detached.get(b, 0) > r.pass_index for b in r.rows)]
    return found


def forward_flops(
    config: ModelConfig,
    rounds: Sequence[Round],
    core: tuple[int, int],
    sliding_window: int | None = None,
    only: range | None = None,
) -> int:
    """FLOPs of the forward of rounds, without the head. only: count these blocks; None: all."""
    return sum(round_flops(config, r, core, sliding_window, only) for r in rounds)
