"""The fields that a record must have, for a run that goes on and for a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.report.runs import find_runs
from sleeptrain.train.logging.record_schema import MOST_PASSES, MOST_STEPS, faults, is_record
from tests.report.test_runs import ONE, make_run

HERE = {"step": 1, "tokens": 8, "time": 0.5}
STEP = HERE | {"loss": 1.0, "passes": 1, "window": 2, "batch": 1}


@pytest.mark.parametrize(
    "value",
    [None, [], "x", {}, {"step": "1"}, {"step": -1}, {"step": True}, {"step": 2**63}, {"step": 1, "rollback": 3},
     {"step": 1, "attempt": {"number": None}}, {"step": 1, "rollback": {}}],
)  # fmt: skip
def test_invalid_records(value: Any) -> None:
    assert not is_record(value)


def test_valid_records() -> None:
    assert is_record({"step": 0}) and is_record({"step": 1, "rollback": {"number": 0}, "more": []})


def test_a_record_as_it_is_written_has_no_faults() -> None:
    found = STEP | {"loss": float("nan"), "skipped": 0, "norms": {"features": {"a": None}, "S": {}}}
    found |= {"attempt": {"code": "x", "number": 1}, "eval": {"loss": {"1": [None, 2.0]}, "accuracy": {"1": 0.5}}}
    assert faults(found) == [] and faults(found | {"flops": 10**24}) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(({name: value}, name) for name in ("passes", "window", "batch") for value in (0, -1, 1.5, None, "2", 2**63)),
        ({"passes": MOST_PASSES + 1}, "passes"),
        ({"loss": "1"}, "loss"),
        ({"tokens": -8}, "tokens"),
        ({"time": float("inf")}, "time"),
        ({"time": -1.0}, "time"),
        ({"step": MOST_STEPS + 1}, "step of at most 10,000,000"),
        ({"skipped": -1}, "skipped"),
        *(({"flops": value}, "flops") for value in (-1, 1.5, None, 10**40)),
        ({"attempt": {"number": 1}}, "attempt.code"),
        ({"norms": {"S": {}}}, "norms.features and norms.S"),
        *(({"eval": value}, "eval.loss by passes") for value in (3, {"loss": {"0": [1.0]}}, {"loss": {"²": [1.0]}})),
        ({"eval": {"loss": {"1": []}}}, "eval.loss by passes"),
        ({"eval": {"loss": {"9" * 5000: [1.0]}}}, "eval.loss by passes"),
        ({"eval": {"loss": {"1": [1.0]}, "sets": {"a": {}}}}, "eval.loss by passes"),
    ],
    ids=str,
)
def test_missing_fields_of_a_report_are_named(changes: dict[str, Any], named: str) -> None:
    assert faults(STEP | changes) == [named]


def test_a_window_of_no_tokens_does_not_spoil_other_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, [], ONE)
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write(json.dumps(STEP | {"window": 0}) + "\n")
    runs, unreadable = find_runs([tmp_path])
    assert [run.folder.name for run in runs] == ["b"]
    assert len(unreadable) == 1 and "the record of step 1 has no window" in unreadable[0]
