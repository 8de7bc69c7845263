"""The model cut into pipeline stages: the stages that a round visits, its layers there, the features that it reads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from sleeptrain.errors import ConfigError
from sleeptrain.sleep.rounds import Round, round_layers


@dataclass(frozen=True)
class PipelineStages:
    """Contiguous layers on each stage. The embedding is on the first stage; the norm and the loss are on the last.

    bounds: stage s holds the layers [bounds[s], bounds[s + 1]).
    layers: each block's mixer, as in `model.layers`.
    core: the blocks [first, last) that sleep passes repeat.
    sliding: eviction is sliding, so attention has a state, too.
    split_head: each stage holds a part of the head, cut by vocabulary; else the last stage holds it whole.
    Raises ConfigError if bounds do not rise from 0 to the number of layers, or if the core is not within them.
    """

    bounds: tuple[int, ...]
    layers: tuple[str, ...]
    core: tuple[int, int]
    sliding: bool = False
    split_head: bool = False

    def __post_init__(self) -> None:
        num_layers = len(self.layers)
        ascending = all(low < high for low, high in zip(self.bounds, self.bounds[1:], strict=False))
        if len(self.bounds) < 2 or self.bounds[0] != 0 or self.bounds[-1] != num_layers or not ascending:
            raise ConfigError(
                f"pipeline stages {list(self.bounds)}: bounds must rise from 0 to the {num_layers} layers of "
                "model.layers, with at least one layer on each stage; use fewer stages or more layers"
            )
        if not 0 <= self.core[0] < self.core[1] <= num_layers:
            raise ConfigError(f"sleep.core {list(self.core)}: must be a range within the {num_layers} layers")

    @property
    def num_stages(self) -> int:
        return len(self.bounds) - 1

    @property
    def first_core(self) -> int:
        """The stage of the core's first layer, where sleep passes begin."""
        return self.stage_of(self.core[0])

    @property
    def last_core(self) -> int:
        """The stage of the core's last layer, which makes the features for the next pass."""
        return self.stage_of(self.core[1] - 1)

    def stage_of(self, layer: int) -> int:
        return bisect_right(self.bounds, layer) - 1

    def layers_of(self, r: Round) -> range:
        """The layers that a round runs: all of them for a wake round with a loss, the core for a sleep pass."""
        return round_layers(r, self.layers, self.core, self.sliding)

    def visited(self, r: Round) -> range:
        """The stages that a round visits, in order; empty if no layer of the round would write a state."""
        layers = self.layers_of(r)
        return range(self.stage_of(layers[0]), self.stage_of(layers[-1]) + 1) if layers else range(0)

    def layers_on(self, r: Round, stage: int) -> int:
        """The number of layers that a round runs on a stage."""
        layers = self.layers_of(r)
        return max(0, min(layers.stop, self.bounds[stage + 1]) - max(layers.start, self.bounds[stage]))

    def ring_width(self, plans: Sequence[Sequence[Round]]) -> int:
        """The number of stages in the ring of fed-back features: as many micro-batches keep it busy. 1 if no ring."""
        feeds_back = any(r.feeds_back and self.visited(r) for rounds in plans for r in rounds)
        return self.last_core - self.first_core + 1 if feeds_back else 1


def feature_sources(rounds: Sequence[Round]) -> list[tuple[int, ...]]:
    """For each round of a micro-batch, the indices of the rounds whose output features it reads.

    The first sleep pass reads the window's wake rounds (one with targets, one without, on different rows); a later pass
    reads the previous pass. A pass without feedback has no sources: it reads the core's input of its wake round, which
    is on the same stage.
    """
    sources: list[tuple[int, ...]] = []
    latest: list[int] = []  # the rounds that made the window's newest features
    for index, r in enumerate(rounds):
        if r.is_wake:
            latest = [i for i in latest if rounds[i].is_wake and rounds[i].window == r.window]
        read = [i for i in latest if set(rounds[i].rows) & set(r.rows)] if r.feeds_back else []
        sources.append(tuple(read))
        latest = [*latest, index] if r.is_wake else [index]
    return sources


def num_trained(rounds: Sequence[Round]) -> int:
    """The number of rounds of a micro-batch that have a backward: all up to its last loss."""
    return 1 + max((index for index, r in enumerate(rounds) if r.loss), default=-1)
