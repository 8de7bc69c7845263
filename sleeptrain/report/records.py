"""The records of a run as a report keeps them: the numbers of training in columns, the few other records as they are.

A long run has a million training records. Kept as objects they would take gigabytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.train.logging.metrics import Record

# What a report reads of each training record, and how an array holds it: 64-bit integers and floats.
COLUMNS = {"step": "q", "tokens": "q", "loss": "d", "passes": "q", "window": "q", "batch": "q"}
# What a report reads of the other records.
READ = ("step", "tokens", "time", "eval", "norms", "attempt", "rollback")


@dataclass
class Records:
    """What metrics.jsonl tells, in the order of the file.

    columns: of the training records, by the names of COLUMNS. evaluations, norms, attempts: the records that have an
    `eval`, `norms` and `attempt`. furthest: (step, tokens) of the record with the highest step; (0, 0) where there is
    none. seconds: wall time between the records of each attempt, without the time after its last one; None where no
    two records tell it. skipped, rollbacks: steps passed over and returns to a checkpoint until the last training
    record. rolled_back: the last record is such a return. cut_short: the last line is not whole.
    """

    columns: dict[str, array[int] | array[float]] = field(
        default_factory=lambda: {name: array(kind) for name, kind in COLUMNS.items()}
    )
    evaluations: list[Record] = field(default_factory=list)
    norms: list[Record] = field(default_factory=list)
    attempts: list[Record] = field(default_factory=list)
    furthest: tuple[int, int] = 0, 0
    seconds: float | None = None
    skipped: int = 0
    rollbacks: int = 0
    rolled_back: bool = False
    cut_short: bool = False

    @property
    def num_steps(self) -> int:
        """How many training records there are."""
        return len(self.columns["step"])

    def column(self, name: str) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
        """One number for each training record."""
        return np.frombuffer(self.columns[name], self.columns[name].typecode)

    @cached_property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Whether the loss of each training record is a finite number."""
        return np.isfinite(self.column("loss"))

    def shape(self, at: int) -> StepShape:
        """That of the training record number `at`."""
        return StepShape(*(int(self.columns[name][at]) for name in ("passes", "window", "batch")))


def collect(records: Iterable[Record]) -> Records:
    """Reads records, which are as `record_schema.faults` wants them, one at a time."""
    found = Records()
    columns = [(name, column.append) for name, column in found.columns.items()]
    for record in _timed(records, found):
        if record["step"] > found.furthest[0]:
            found.furthest = record["step"], record["tokens"]
        found.rolled_back = "rollback" in record
        if "loss" in record:
            for name, append in columns:
                append(record[name])
            found.skipped, found.rollbacks = record.get("skipped", 0), record.get("rollbacks", 0)
        for name, kept in (("eval", found.evaluations), ("norms", found.norms), ("attempt", found.attempts)):
            if name in record:
                kept.append({name: record[name] for name in READ if name in record})
    return found


def _timed(records: Iterable[Record], found: Records) -> Iterator[Record]:
    """The same records; sums up their times."""
    before = None
    for record in records:
        if before is not None and "attempt" not in record:
            found.seconds = (found.seconds or 0.0) + record["time"] - before
        before = record["time"]
        yield record
