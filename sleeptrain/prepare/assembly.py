"""The result folder, made of complete units: numbered shards, an index for each side, the tokenizer, the record."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from sleeptrain.data.shard_index import Shard, index_name, write_index
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import DataError
from sleeptrain.files import sync, write_whole
from sleeptrain.prepare.report import UnitReport, total
from sleeptrain.prepare.split import SIDES
from sleeptrain.prepare.work import Work
from sleeptrain.prepare.worker import unit_folder

RECORD = "prepared.json"


def assemble(work: Work, units: Sequence[tuple[int, UnitReport]], tokenizer: Tokenizer, record: bytes) -> None:
    """Build `work.result` from units, each with its number and report, in order. Every side must have a document.

    Shards are moved, not copied. The reports alone decide where each shard goes, so that the same call after a kill
    moves the remaining shards. Raises DataError when a shard is in neither place.
    """
    totals = total(report for _, report in units)
    for side in SIDES:
        folder = work.result / side
        folder.mkdir(parents=True, exist_ok=True)
        shards = list(_move_shards(work, units, side, folder))
        write_index(
            folder,
            shards,
            name=f"{work.out.name} {side}",
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash,
            num_bytes=totals.sides[side].num_bytes,
        )
        sync(folder)
    for name, content in tokenizer.files.items():
        write_whole(work.result / name, content)
    write_whole(work.result / RECORD, record)


def _move_shards(work: Work, units: Iterable[tuple[int, UnitReport]], side: str, folder: Path) -> Iterable[Shard]:
    """Move the shards of one side into `folder`, and yield each with its new name."""
    count = 0
    for number, report in units:
        for shard in report.sides[side].shards:
            moved = replace(shard, url=f"shard-{count:06d}.tar")
            origin = unit_folder(work.units, number) / side
            for old, new in ((shard.url, moved.url), (index_name(shard.url), index_name(moved.url))):
                _move(origin / old, folder / new, work)
            count += 1
            yield moved


def _move(origin: Path, target: Path, work: Work) -> None:
    if origin.exists():
        os.rename(origin, target)
    elif not target.exists():
        raise DataError(f"{origin} is gone; remove {work.path} and call again to start anew")
