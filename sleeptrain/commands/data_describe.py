"""The documents that a step of a run reads, and the waste of each layout of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sleeptrain.config.schema import Config
from sleeptrain.data.assignment import Assignment
from sleeptrain.data.source import ShardsSource
from sleeptrain.data.stream import ShardStream
from sleeptrain.sleep.curriculum import stage_shape

SAMPLED_STEPS = 64
LAYOUTS = ("lanes", "packed", "one_document")


@dataclass(frozen=True)
class Read:
    """Tokens of one document in one row of a step.

    row: index of the row in the step.
    at: (first, end) of the tokens in the row, end excluded.
    source: name of the source.
    shard: URL of the shard.
    document: index of the document in the shard.
    tokens: (first, end) of the same tokens in the document, end excluded.
    """

    row: int
    at: tuple[int, int]
    source: str
    shard: str
    document: int
    tokens: tuple[int, int]


def cuts_before(config: Config, step: int, saved: Sequence[tuple[int, int]] = ()) -> tuple[list[tuple[int, int]], int]:
    """The cuts of a run before its step `step` (the first is 1), as (rows, steps) in order, and the rows of that step.

    saved: (rows, steps) in order from a checkpoint, used as they are. Later cuts follow from the curriculum, which here
    counts every token of a row as seen, pads too.
    """
    cuts: list[tuple[int, int]] = []
    remaining = step - 1
    for rows, steps in saved:
        if steps > remaining:
            return [*cuts, (rows, remaining)] if remaining else cuts, rows
        cuts.append((rows, steps))
        remaining -= steps
    seen = sum(rows * steps for rows, steps in cuts) * config.data.sequence
    while remaining:
        rows = stage_shape(config, seen).batch
        seen += rows * config.data.sequence
        remaining -= 1
        if cuts and cuts[-1][0] == rows:
            cuts[-1] = (rows, cuts[-1][1] + 1)
        else:
            cuts.append((rows, 1))
    return cuts, stage_shape(config, seen).batch


def reads(source: ShardsSource, assignment: Assignment, step: int) -> Iterator[Read]:
    """The pieces of documents that the rows of a step read, in the order of the rows."""
    begin = step * source.sequence
    names = list(source.train)
    for row in range(assignment.num_rows):
        for piece in assignment.pieces(step, row):
            first = max(int(piece["begin"]), begin)
            last = min(int(piece["begin"] + piece["length"]), begin + source.sequence)
            skipped = int(piece["offset"]) + first - int(piece["begin"])
            name = names[piece["source"]]
            shard = source.train[name].shards[piece["shard"]].url
            tokens = (skipped, skipped + last - first)
            yield Read(row, (first - begin, last - begin), name, shard, int(piece["index"]), tokens)


@dataclass(frozen=True)
class Waste:
    """Shares of the tokens of a step, 0 to 1.

    pads: tokens that are pads.
    cut_off: tokens of documents whose beginning the memory of the row does not hold.
    """

    pads: float
    cut_off: float


def waste(stream: ShardStream, rows: int, steps: int) -> Waste:
    """The waste of the stream's layout, sampled at even distances in the next `steps`. Reads only lengths."""
    total = pads = cut_off = 0
    sequence = stream.settings.sequence
    assignment, _ = stream.next_step(rows)
    for step in np.unique(np.linspace(0, max(steps - 1, 0), SAMPLED_STEPS).astype(int)).tolist():
        begin = step * sequence
        for row in range(rows):
            pieces = assignment.pieces(step, row)
            ends = np.minimum(pieces["begin"] + pieces["length"], begin + sequence)
            tokens_P = ends - np.maximum(pieces["begin"], begin)
            lost = pieces["offset"] > 0
            if stream.settings.layout == "packed":
                lost |= pieces["begin"] < begin
            total += sequence
            pads += sequence - int(tokens_P.sum())
            cut_off += int(tokens_P[lost].sum())
    return Waste(pads / total, cut_off / total)


def describe(config: Config) -> str:
    """Lines with the sources, how often each is read, the range of the shuffle, and the waste of each layout."""
    source = ShardsSource(config.data)
    steps = -(-config.train.tokens // (config.data.batch * config.data.sequence))
    cuts, _ = cuts_before(config, steps + 1)
    source.stream.seek(cuts)
    epochs = source.stream.epochs()
    lines = [f"{steps:,} steps of {config.data.batch} rows of {config.data.sequence:,} tokens"]
    for name, shards in source.train.items():
        mean = shards.num_tokens // shards.num_documents
        group = min(config.data.shards.shuffle, shards.num_shards)
        lines.append(
            f"{name}: {shards.num_documents:,} documents, {shards.num_tokens:,} tokens, {mean:,} a document, "
            f"{shards.num_shards:,} shards; read {epochs[name]:.3g} times; "
            f"shuffled within {group} random shards, {group * shards.num_tokens // shards.num_shards:,} tokens"
        )
    for layout in LAYOUTS:
        measured = ShardsSource(replace(config.data, layout=layout))
        w = waste(measured.stream, config.data.batch, steps)
        chosen = " (data.layout)" if layout == config.data.layout else ""
        lines.append(
            f"{layout}: {w.pads:.2%} pads, {w.cut_off:.2%} of tokens cut off from their document's beginning{chosen}"
        )
    return "\n".join(lines)
