"""The features that rounds pass on to later rounds of their window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils._pytree import register_dataclass

from sleeptrain.sleep.inputs import RoundInputs, row_index


@dataclass(frozen=True)
class Features:
    """Features [R, L, D] of some rows.

    rows: the rows' indices in the batch.
    core_input_RLD: the core's input, which sleep passes without feedback read.
    output_RLD: the core's output, which sleep passes with feedback read.
    """

    rows: tuple[int, ...]
    core_input_RLD: torch.Tensor | None
    output_RLD: torch.Tensor | None


register_dataclass(Features)


def select(features: Sequence[Features], rows: tuple[int, ...], inputs: RoundInputs) -> Features:
    """The features of `rows`, gathered from the features of previous rounds."""
    core_inputs = [(part.rows, part.core_input_RLD) for part in features if part.core_input_RLD is not None]
    outputs = [(part.rows, part.output_RLD) for part in features if part.output_RLD is not None]
    return Features(rows, gather_rows(core_inputs, rows, inputs), gather_rows(outputs, rows, inputs))


def gather_rows(
    parts: Sequence[tuple[tuple[int, ...], torch.Tensor]], rows: tuple[int, ...], inputs: RoundInputs
) -> torch.Tensor:
    """The features [R, L, D] of `rows`. parts: (rows, features of these rows). inputs: of the round that reads them.

    A sleep pass that skips ended documents reads the last features of the wake pass.
    """
    length = inputs.tokens_RL.shape[1]
    parts = [(part_rows, _last(features, length)) for part_rows, features in parts]
    if len(parts) == 1 and parts[0][0] == rows:
        return parts[0][1]
    order = tuple(row for part_rows, _ in parts for row in part_rows)
    index = inputs.source_index_R if order == inputs.source_rows else row_index(order, rows)
    joined = torch.cat([features for _, features in parts])
    return joined if index is None else joined.index_select(0, index.to(joined.device))


def _last(features_RLD: torch.Tensor, length: int) -> torch.Tensor:
    skipped = features_RLD.shape[1] - length
    return features_RLD[:, skipped:] if skipped else features_RLD
