"""The data that is kept of a metrics file: the numbers of training in columns, and little else."""

from __future__ import annotations

import tracemalloc
from typing import Any

from sleeptrain.report.records import collect
from sleeptrain.sleep.curriculum import StepShape
from tests.report.made import STEP, accuracy, attempt, step


def test_numbers_of_training_are_in_columns() -> None:
    records = collect(
        [attempt(1, 0, 100.0), step(1, 2.5), step(2, float("nan"), passes=3, skipped=1), accuracy(2, 0.5)]
    )
    assert records.column("step").tolist() == [1, 2] and records.column("tokens").tolist() == [STEP, 2 * STEP]
    assert records.column("loss")[0] == 2.5 and records.finite.tolist() == [True, False]
    assert records.shape(0) == StepShape(1, 20, 8) and records.shape(1) == StepShape(3, 20, 8)
    assert (records.num_steps, records.skipped, records.rollbacks, records.rolled_back) == (2, 1, 0, False)
    assert [record["step"] for record in records.evaluations] == [2] and len(records.attempts) == 1
    assert records.furthest == (2, 2 * STEP) and records.seconds == 2.0


def test_no_record_leaves_columns_without_numbers() -> None:
    records = collect([])
    assert records.num_steps == 0 and records.column("loss").tolist() == [] and records.furthest == (0, 0)


def test_a_return_to_a_checkpoint_is_seen() -> None:
    back: dict[str, Any] = {"step": 1, "tokens": STEP, "time": 200.0, "rollback": {"number": 1}}
    assert collect([step(1), step(2), back]).rolled_back
    assert not collect([step(1), back, step(2)]).rolled_back


def test_recorded_flops_are_those_of_evaluations_and_of_the_end() -> None:
    made = [attempt(1, 0, 100.0), step(1), accuracy(1, 0.5), step(2), accuracy(2, 0.5), step(3)]
    counted = [record | {"flops": 10 * record["step"]} for record in made]
    assert collect(counted).flops == {0: 0, 1: 10, 2: 20, 3: 30}
    assert collect([]).flops == {0: 0}
    for index in (2, 4, 5):
        without = [record if i != index else made[i] for i, record in enumerate(counted)]
        assert collect(without).flops is None, "an early version wrote a record that is needed"


def test_fields_that_no_report_reads_are_not_kept() -> None:
    [norms] = collect([step(1, norms={"features": {}, "S": {}}, grad_norm=2.0, data={"a": 1})]).norms
    assert set(norms) == {"step", "tokens", "time", "norms"}


def test_a_training_record_takes_few_bytes() -> None:
    """A million of them take 50 MB. As objects they would take a gigabyte."""
    count = 20_000
    tracemalloc.start()
    records = collect(step(number) for number in range(1, count + 1))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert records.num_steps == count and held < 70 * count
