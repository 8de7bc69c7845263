"""Rule 110: what is the first cell of each string after `steps` updates? Reasoning over context that is gone.

A row is `strings` random binary strings of `width` cells, one window each, and then the answers: the first cell of each
string after `steps` updates of the elementary cellular automaton 110 with periodic boundary. Only the answers have a
loss: their inputs are [SEP, l0, l1, ...] and their targets [l0, l1, l2, ...].
The sleep paper (arXiv 2605.26099), section 6.1; the boundary and the answers' format, which it leaves open, are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sleeptrain.config.schema import Rule110Config
from sleeptrain.data.batch import IGNORE, Batch, Part
from sleeptrain.data.philox import WORDS_PER_COUNT, random_words
from sleeptrain.data.position import check_position
from sleeptrain.errors import ConfigError

SEP = 2
VOCAB_SIZE = 3
# Random streams: training uses (seed, TRAIN), so that no seed draws the held-out samples or those of the estimate.
TRAIN, VALIDATION, PRIOR = range(3)
PRIOR_SAMPLES = 2**16


def evolve(cells: np.ndarray, steps: int) -> np.ndarray:
    """`steps` updates of Rule 110, periodic along the first axis; cells [width, ...], any integer type.

    Bitwise, so that each bit of a cell is an automaton of its own. A cell becomes 1 unless it and its right neighbour
    are 0, or it and both neighbours are 1: the bits of 110 = 0b01101110.
    """
    for _ in range(steps):
        left, right = np.roll(cells, 1, axis=0), np.roll(cells, -1, axis=0)
        cells = (cells | right) & ~(left & cells & right)
    return cells


def draw_strings(config: Rule110Config, seed: int, stream: int, first: int, count: int) -> np.ndarray:
    """The samples [first, first + count) of (seed, stream): uint8 [count, strings, width] of random cells.

    A sample is a function of (seed, stream, its number) alone: it owns a range of the counter.
    """
    bits = config.strings * config.width
    counts = -(-bits // (64 * WORDS_PER_COUNT))
    words = random_words(count * counts * WORDS_PER_COUNT, seed, stream, first * counts)
    words = words.astype("<u8").reshape(count, counts * WORDS_PER_COUNT)
    drawn = np.unpackbits(words.view(np.uint8), axis=1, count=bits)
    return drawn.reshape(count, config.strings, config.width)


def first_cells(cells: np.ndarray, steps: int) -> np.ndarray:
    """The label of each string: its first cell after `steps` updates. cells uint8 [..., width] -> uint8 [...]."""
    shape = cells.shape[:-1]
    flat = cells.reshape(-1, cells.shape[-1])
    packed = np.ascontiguousarray(np.packbits(flat, axis=0).T)  # eight strings to a byte, [width, ceil(strings / 8)]
    return np.unpackbits(evolve(packed, steps)[0], count=len(flat)).reshape(shape)


def exact_accuracy(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> float:
    """The share of rows whose answers are all right by argmax.

    logits_BSV: the logits at the answers, the last `strings` positions of a row. labels_BS: the targets there.
    """
    return (logits_BSV.argmax(-1) == labels_BS).all(-1).double().mean().item()


def majority_accuracy(config: Rule110Config) -> float:
    """The exact accuracy of always answering the more likely label, estimated on 65,536 samples: what guessing gives.

    The strings of a row are independent, so it is the accuracy of one answer to the power of their number.
    """
    labels = first_cells(draw_strings(config, 0, PRIOR, 0, PRIOR_SAMPLES), config.steps)
    ones = float(labels.mean())
    return max(ones, 1 - ones) ** config.strings


class Rule110Source:
    """Fresh samples for ever: the strings are a function of (seed, number of the sample). See `data.source.Source`.

    sequence: strings * width + strings. window: the tokens of a string, which `sleep.window` must equal.
    Raises ConfigError for a shape without sense.
    """

    vocab_size = VOCAB_SIZE
    held_out = ("rule110",)

    def __init__(self, config: Rule110Config, seed: int, part: Part | None = None) -> None:
        _check(config)
        self.part = part or Part()
        self._config = config
        self._seed = seed
        self._position = 0
        self.window = config.width
        self.sequence = config.strings * config.width + config.strings

    def batch(self, rows: int) -> Batch:
        mine = self.part.rows(rows)
        batch = self._samples(self._seed, TRAIN, self._position + mine.start, len(mine))
        self.skip(rows)
        return batch

    def skip(self, rows: int) -> None:
        self._position += rows

    def validation_batches(self, name: str, rows: int, count: int | None = None) -> Iterator[Batch]:
        """The `validation_samples` held-out samples, the same for every seed; `count` keeps the first batches."""
        total = self._config.validation_samples
        stop = total if count is None else min(total, count * rows)
        for first in range(0, stop, rows):
            yield self._samples(0, VALIDATION, first, min(rows, stop - first))

    def report(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        """position: samples drawn so far."""
        return {"position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError when the state was saved with another seed or shape of the task."""
        check_position(state, self._identity())
        self._position = state["position"]

    def _identity(self) -> dict[str, int]:
        config = self._config
        return {
            "data.seed": self._seed,
            "data.rule110.width": config.width,
            "data.rule110.strings": config.strings,
            "data.rule110.steps": config.steps,
        }

    def _samples(self, seed: int, stream: int, first: int, rows: int) -> Batch:
        cells_BSW = draw_strings(self._config, seed, stream, first, rows)
        labels_BS = torch.from_numpy(first_cells(cells_BSW, self._config.steps).astype(np.int64))
        cells_BT = torch.from_numpy(cells_BSW.astype(np.int64)).flatten(1)
        separator_B1 = torch.full((rows, 1), SEP)
        apart_B = torch.zeros(rows, dtype=torch.bool)
        return Batch(
            tokens_BT=torch.cat([cells_BT, separator_B1, labels_BS[:, :-1]], 1),
            targets_BT=torch.cat([torch.full_like(cells_BT, IGNORE), labels_BS], 1),
            documents_BT=(first + torch.arange(rows))[:, None].repeat(1, self.sequence),
            carried_B=apart_B,
            continues_B=apart_B,
        )


def _check(config: Rule110Config) -> None:
    least = {"width": 3, "strings": 1, "steps": 1, "validation_samples": 1}
    for name, bound in least.items():
        if getattr(config, name) < bound:
            raise ConfigError(f"data.rule110.{name}={getattr(config, name)} must be at least {bound}")
    if config.strings > config.width:
        raise ConfigError(
            f"data.rule110.strings={config.strings} must not exceed data.rule110.width={config.width}: "
            "the answers share one window"
        )
