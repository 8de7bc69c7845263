"""The records of a run in memory: training records as columns of numbers, the few other records unchanged.

A long run has a million training records, which as objects would take gigabytes.
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

# Fields of a training record that a report reads, with their array type: 64-bit integers and floats.
COLUMNS = {"step": "q", "tokens": "q", "loss": "d", "passes": "q", "window": "q", "batch": "q"}
# Fields of other records that a report reads.
READ = ("step", "tokens", "time", "flops", "eval", "norms", "attempt", "rollback")


@dataclass
class Records:
    """The content of metrics.jsonl, in the order of the file.

    columns: {field: values of the training records}, for the fields in COLUMNS.
    evaluations, norms, attempts: the records with a field `eval`, `norms` or `attempt`.
    furthest: (step, tokens) of the record with the highest step; (0, 0) without records.
    furthest_flops: the FLOPs of that record; None if it has none.
    seconds: wall time of all attempts, each from its first to its last record; None if no attempt has two records.
    skipped: skipped steps up to the last training record.
    rollbacks: rollbacks to a checkpoint up to the last training record.
    rolled_back: the last record is of a rollback.
    cut_short: the last line is incomplete.
    """

    columns: dict[str, array[int] | array[float]] = field(
        default_factory=lambda: {name: array(kind) for name, kind in COLUMNS.items()}
    )
    evaluations: list[Record] = field(default_factory=list)
    norms: list[Record] = field(default_factory=list)
    attempts: list[Record] = field(default_factory=list)
    furthest: tuple[int, int] = 0, 0
    furthest_flops: int | None = 0
    seconds: float | None = None
    skipped: int = 0
    rollbacks: int = 0
    rolled_back: bool = False
    cut_short: bool = False

    @property
    def num_steps(self) -> int:
        """The number of training records."""
        return len(self.columns["step"])

    def column(self, name: str) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
        """One number for each training record."""
        return np.frombuffer(self.columns[name], self.columns[name].typecode)

    @cached_property
    def finite(self) -> npt.NDArray[np.bool_]:
        """True for each training record whose loss is finite."""
        return np.isfinite(self.column("loss"))

    @property
    def flops(self) -> dict[int, int] | None:
        """{step: model FLOPs of all steps up to it}, as recorded, for each evaluation and the last record.

        None if one of these records has no FLOPs: an older version wrote it.
        """
        recorded = {0: 0, self.furthest[0]: self.furthest_flops} | {r["step"]: r.get("flops") for r in self.evaluations}
        known = {step: flops for step, flops in recorded.items() if flops is not None}
        return known if len(known) == len(recorded) else None

    def shape(self, index: int) -> StepShape:
        """The shape of the step of training record `index`."""
        return StepShape(*(int(self.columns[name][index]) for name in ("passes", "window", "batch")))


def collect(records: Iterable[Record]) -> Records:
    """Read records one at a time. Each must be free of `record_schema.faults`."""
    result = Records()
    columns = [(name, column.append) for name, column in result.columns.items()]
    for record in _timed(records, result):
        if record["step"] > result.furthest[0]:
            result.furthest, result.furthest_flops = (record["step"], record["tokens"]), record.get("flops")
        result.rolled_back = "rollback" in record
        if "loss" in record:
            for name, append in columns:
                append(record[name])
            result.skipped, result.rollbacks = record.get("skipped", 0), record.get("rollbacks", 0)
        for name, selected in (("eval", result.evaluations), ("norms", result.norms), ("attempt", result.attempts)):
            if name in record:
                selected.append({name: record[name] for name in READ if name in record})
    return result


def _timed(records: Iterable[Record], result: Records) -> Iterator[Record]:
    """Yield the records, and sum up their times in `result.seconds`."""
    previous = None
    for record in records:
        if previous is not None and "attempt" not in record:
            result.seconds = (result.seconds or 0.0) + record["time"] - previous
        previous = record["time"]
        yield record
