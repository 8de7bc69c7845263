"""Rule 110: what is a cell of each string after `steps` updates? Reasoning over evicted context.

A row has `strings` random binary strings of `width` cells and then the answers: cell number `label` of each string
after `steps` updates of the elementary cellular automaton 110. Only the answers have a loss: their inputs are
[SEP, l0, l1, ...] and their targets [l0, l1, l2, ...], so that no window of cells has a target.
With `mixed_steps` each row has its own number of updates, and a token before each string tells it: no sleep could know
how much there is to compute if only the answers' window said so.
The sleep paper (arXiv 2605.26099), section 6.1. The paper does not define the boundary and the answers' format; these
are our choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sleeptrain.config.schema import Rule110Config
from sleeptrain.config.task_rows import rule110_rows
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.data.philox import WORDS_PER_COUNT, random_words
from sleeptrain.data.tasks.split import ATTEMPTS, are_held_out
from sleeptrain.data.tasks.task import PRIOR, TRAIN, VALIDATION, Answered
from sleeptrain.errors import ConfigError

SEP = 2
FIRST_STEPS = 3  # the id that tells the first of `mixed_steps`
PRIOR_SAMPLES = 2**16
# The cells beyond the edge, with eight strings in a byte; None: the cells of the other edge.
OUTSIDE = {"periodic": None, "zeros": 0x00, "ones": 0xFF}


def evolve(cells: np.ndarray, steps: int, outside: int | None = None) -> np.ndarray:
    """`steps` updates of Rule 110 along the first axis; cells [width, ...], any integer type.

    outside: the value of the cells beyond the edge; None: the axis is a ring. The update is bitwise, so each bit
    position is a separate automaton. A cell becomes 1 unless it and its right neighbour are 0, or it and both
    neighbours are 1: the bits of 110 = 0b01101110.
    """
    for _ in range(steps):
        left, right = np.roll(cells, 1, axis=0), np.roll(cells, -1, axis=0)
        if outside is not None:
            left[0] = right[-1] = outside
        cells = (cells | right) & ~(left & cells & right)
    return cells


def labels(cells: np.ndarray, config: Rule110Config, steps: int) -> np.ndarray:
    """The label of each string after `steps` updates: uint8 [..., width] of 0 and 1 -> uint8 [...]."""
    shape = cells.shape[:-1]
    flat = cells.reshape(-1, cells.shape[-1])
    packed = np.ascontiguousarray(np.packbits(flat, axis=0).T)  # eight strings to a byte, [width, ceil(strings / 8)]
    after = evolve(packed, steps, OUTSIDE[config.boundary])
    return np.unpackbits(after[config.label], count=len(flat)).reshape(shape)


def draw_strings(
    config: Rule110Config, seed: int, stream: int, first: int, count: int, held_out: bool | None = None
) -> np.ndarray:
    """The samples [first, first + count) of (seed, stream): uint8 [count, strings, width] of random cells.

    A sample is a function of (seed, stream, its number), because it has its own range of the counter. held_out: the
    side of the split; None: any. A sample on the wrong side is drawn again. Raises ConfigError if the right side has
    too few samples.
    """
    words_BW = _draw_words(config, seed, stream, first, count)
    for attempt in range(1, ATTEMPTS):
        wrong = np.empty(0) if held_out is None else np.flatnonzero(are_held_out(words_BW) != held_out)
        if not len(wrong):
            break
        low, high = int(wrong[0]), int(wrong[-1]) + 1
        again_BW = _draw_words(config, seed, stream + (PRIOR + 1) * attempt, first + low, high - low)
        words_BW[wrong] = again_BW[wrong - low]
    else:
        raise ConfigError(
            f"data.rule110.width={config.width} and data.rule110.strings={config.strings} make too few different rows "
            "to hold some out: raise one of them"
        )
    drawn = np.unpackbits(words_BW.view(np.uint8), axis=1, count=config.strings * config.width)
    return drawn.reshape(count, config.strings, config.width)


def _draw_words(config: Rule110Config, seed: int, stream: int, first: int, count: int) -> np.ndarray:
    """The cells of samples as bits of little-endian words, uint64 [count, W]; the bits after the last cell are 0."""
    bits = config.strings * config.width
    width = -(-bits // 64)
    counts = -(-width // WORDS_PER_COUNT)
    words = random_words(count * counts * WORDS_PER_COUNT, seed, stream, first * counts)
    words_BW = words.astype("<u8", copy=False).reshape(count, counts * WORDS_PER_COUNT)[:, :width].copy()
    bytes_BX = words_BW.view(np.uint8)
    bytes_BX[:, -(-bits // 8) :] = 0
    if bits % 8:
        bytes_BX[:, bits // 8] &= 0xFF00 >> bits % 8 & 0xFF  # unpackbits reads the highest bit of a byte first
    return words_BW


def draw_steps(config: Rule110Config, seed: int, stream: int, first: int, count: int) -> np.ndarray:
    """The number of updates of each of the samples [first, first + count): int64 [count].

    With `mixed_steps` they are uniform draws, independent of the cells.
    """
    choices = np.array(config.mixed_steps or [config.steps], np.int64)
    if len(choices) == 1:
        return choices.repeat(count)
    own_stream = stream + (PRIOR + 1) * ATTEMPTS  # after those of the attempts to draw a sample's cells
    words = random_words(count * WORDS_PER_COUNT, seed, own_stream, first)[::WORDS_PER_COUNT]
    return choices[(words % np.uint64(len(choices))).astype(np.int64)]


class Rule110:
    """A `Task`. sequence: strings * width cells and one answer for each string; with `mixed_steps` a token before each
    string, whose id is 3 + the index of the row's number of updates.

    Raises ConfigError if there are too few different strings to hold some out.
    """

    name = "rule110"
    tokenizer_hash: str | None = None
    rows_alike = True

    def __init__(self, config: Rule110Config) -> None:
        self._config = config
        self._shape = rule110_rows(config)
        self.sequence = self._shape.sequence
        self.vocab_size = FIRST_STEPS + len(config.mixed_steps)
        self.num_held_out = config.validation_samples
        for held_out in (True, False):  # so that a ConfigError comes here and not at the first evaluation
            draw_strings(config, 0, PRIOR, 0, 1, held_out)

    def rows(self, seed: int, first: int, count: int) -> Batch:
        return self._batch(seed, TRAIN, first, count)

    def held_out(self, first: int, count: int) -> Batch:
        return self._batch(0, VALIDATION, first, count)

    def metrics(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """accuracy: share of rows with all labels right. bits: share of right labels. sampled: expected accuracy if
        labels are drawn from the model's probabilities. accuracy_by_steps: with `mixed_steps`, the accuracy of the rows
        of each number of updates; passes_by_steps: under a stop rule, their mean passes."""
        last = slice(-self._config.strings, None)
        right_BS = torch.cat([a.right_BT[:, last] for a in answered])
        loss_BS = torch.cat([a.loss_BT[:, last] for a in answered]).double()
        right_B = right_BS.all(-1).double()
        metrics: dict[str, Any] = {
            "accuracy": right_B.mean().item(),
            "bits": right_BS.double().mean().item(),
            "sampled": loss_BS.sum(-1).neg().exp().mean().item(),
        }
        if self._config.mixed_steps:
            steps_id_B = torch.cat([a.batch.tokens_BT[:, 0] for a in answered])
            metrics["accuracy_by_steps"] = self._by_steps(right_B, steps_id_B)
            passes = [a.passes_B for a in answered if a.passes_B is not None]
            if passes:
                metrics["passes_by_steps"] = self._by_steps(torch.cat(passes), steps_id_B)
        return metrics

    def _by_steps(self, values_B: torch.Tensor, steps_id_B: torch.Tensor) -> dict[str, float]:
        """The mean over the rows of each number of updates that occurs. steps_id_B: the first id of each row."""
        by_steps = {t: values_B[steps_id_B == FIRST_STEPS + i] for i, t in enumerate(self._config.mixed_steps)}
        return {f"t={t}": values.mean().item() for t, values in by_steps.items() if len(values)}

    def guessing(self) -> dict[str, float]:
        """Accuracies without the context. chance: all answers equally likely. majority: always the more frequent label.
        majority_bits: the same, as share of labels. sampled: labels drawn with their true frequency.

        Strings are independent, so the accuracy of a row is that of a label to the power of `strings`. With
        `mixed_steps` each is the mean over the numbers of updates, and a guess knows that of its row.
        """
        strings = self._config.strings
        return {
            "chance": 0.5**strings,
            "majority": _mean(p**strings for p in self._likelier),
            "majority_bits": _mean(self._likelier),
            "sampled": _mean((p**2 + (1 - p) ** 2) ** strings for p in self._likelier),
        }

    def text(self, tokens: Sequence[int]) -> str:
        names = [f" t={steps}: " for steps in self._config.mixed_steps]
        return "".join([*"01|", *names][token] for token in tokens)

    def report(self) -> dict[str, Any]:
        return {}

    def identity(self) -> dict[str, Any]:
        names = ["width", "strings", "steps", "boundary", "label"]
        if self._config.mixed_steps:  # positions saved without it stay valid
            names[names.index("steps")] = "mixed_steps"
        return {f"data.rule110.{name}": getattr(self._config, name) for name in names}

    @cached_property
    def _likelier(self) -> list[float]:
        """The share of the more frequent label for each number of updates, estimated on 65,536 held-out samples."""
        drawn = draw_strings(self._config, 0, PRIOR, 0, PRIOR_SAMPLES, held_out=True)
        ones = [float(labels(drawn, self._config, t).mean()) for t in self._config.mixed_steps or [self._config.steps]]
        return [max(share, 1 - share) for share in ones]

    def _batch(self, seed: int, stream: int, first: int, count: int) -> Batch:
        config, context = self._config, self._shape.context
        cells_BSW = draw_strings(config, seed, stream, first, count, held_out=stream == VALIDATION)
        steps_B = draw_steps(config, seed, stream, first, count)
        labels_BS = np.empty((count, config.strings), np.int64)
        tokens_BSW = cells_BSW.astype(np.int64)
        for steps in np.unique(steps_B):
            labels_BS[steps_B == steps] = labels(cells_BSW[steps_B == steps], config, int(steps))
        if config.mixed_steps:
            steps_id_B = FIRST_STEPS + np.array([config.mixed_steps.index(steps) for steps in steps_B], np.int64)
            tokens_BSW = np.concatenate(
                [np.broadcast_to(steps_id_B[:, None, None], (*labels_BS.shape, 1)), tokens_BSW], 2
            )
        tokens_BT = np.empty((count, self.sequence), np.int64)
        tokens_BT[:, :context] = tokens_BSW.reshape(count, context)
        tokens_BT[:, context] = SEP
        tokens_BT[:, context + 1 :] = labels_BS[:, :-1]
        targets_BT = np.full_like(tokens_BT, IGNORE)
        targets_BT[:, context:] = labels_BS
        apart_B = torch.zeros(count, dtype=torch.bool)
        documents_BT = (first + torch.arange(count))[:, None].repeat(1, self.sequence)
        return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT), documents_BT, apart_B, apart_B)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
