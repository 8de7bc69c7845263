"""Counts of documents, bytes and tokens of a preparation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sleeptrain.data.shard_index import Shard
from sleeptrain.prepare.split import SIDES
from sleeptrain.prepare.work_schema import UNIT_CHECKS, read_checked


@dataclass
class Tally:
    """Counts of one side.

    tokens: with BOS and EOS. num_bytes: of text. longest: tokens of the longest document.
    """

    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0
    longest: int = 0
    shards: list[Shard] = field(default_factory=list)

    def add(self, tokens: int, num_bytes: int) -> None:
        self.documents += 1
        self.tokens += tokens
        self.num_bytes += num_bytes
        self.longest = max(self.longest, tokens)

    def summary(self) -> dict[str, Any]:
        """The counts that the user sees."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes_per_token": round(self.num_bytes / self.tokens, 3) if self.tokens else 0.0,
            "longest": self.longest,
        }


@dataclass
class UnitReport:
    """Counts of one unit.

    sides: counts by side.
    empty, bad: number of documents left out because they are empty or bad.
    first_bad: place and reason of the first bad document.
    max_document_bytes: a document with more was bad. 0 in a total of units, which may have different limits.
    """

    sides: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in SIDES})
    empty: int = 0
    bad: int = 0
    first_bad: str | None = None
    max_document_bytes: int = 0

    @property
    def documents(self) -> int:
        return sum(tally.documents for tally in self.sides.values())

    @property
    def num_bytes(self) -> int:
        return sum(tally.num_bytes for tally in self.sides.values())

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> UnitReport:
        """The report that `to_json` wrote. Raises DataError if it is damaged."""
        content = read_checked(path, UNIT_CHECKS, "make it anew with --force")
        for name, tally in content["sides"].items():
            tally["shards"] = [Shard(**shard) for shard in tally["shards"]]
            content["sides"][name] = Tally(**tally)
        return cls(**{entry.name: content[entry.name] for entry in fields(cls)})


def total(reports: Iterable[UnitReport]) -> UnitReport:
    """The sum of the reports, with all shards in order under the names that they have in their units."""
    result = UnitReport()
    for report in reports:
        for name, tally in report.sides.items():
            side = result.sides[name]
            side.documents += tally.documents
            side.tokens += tally.tokens
            side.num_bytes += tally.num_bytes
            side.longest = max(side.longest, tally.longest)
            side.shards += tally.shards
        result.empty += report.empty
        result.bad += report.bad
        result.first_bad = result.first_bad or report.first_bad
    return result
