"""The metrics file: exact floats, and no gap and no double step after a kill and a resume."""

import math
import os
from pathlib import Path

import pytest

from sleeptrain.errors import DataError
from sleeptrain.train.logging.metrics import MetricsFile, mean_later_windows, read_metrics


def write(path: Path, first: int, last: int) -> None:
    file = MetricsFile(path)
    for step in range(first, last + 1):
        file.append({"step": step, "loss": 1 / step})
    file.close()


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_records_read_back_exactly(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, math.pi * 1e-300, 5e-324, -0.0, 2.0**-1074, 1.7976931348623157e308, math.inf, -math.inf]
    record = {"step": 1, "values": values, "eval": {"loss": {"4": [0.1, None]}}}
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(record)
    file.append({"step": 2, "loss": math.nan})
    file.sync()
    first, second = read_metrics(file.path)  # the file is still open: every record is in it at once
    assert first == record and math.copysign(1, first["values"][4]) == -1
    assert math.isnan(second["loss"])
    file.close()


def test_one_line_a_record_and_a_resume_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3)
    write(path, 4, 5)
    assert steps(path) == [1, 2, 3, 4, 5]
    assert path.read_bytes().count(b"\n") == 5


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_killed_anywhere_and_resumed_leaves_no_gap_and_no_double_step(tmp_path: Path, cut: int) -> None:
    """A checkpoint at step 4, a kill after `cut` more bytes, a resume: the file is the same as without a kill."""
    uncut, path = tmp_path / "whole.jsonl", tmp_path / "metrics.jsonl"
    write(uncut, 1, 9)
    content = uncut.read_bytes()
    at_checkpoint = sum(len(line) for line in content.splitlines(keepends=True)[:4])
    path.write_bytes(content[: at_checkpoint + cut])
    file = MetricsFile(path)
    file.truncate_after(4, 0)
    for step in range(5, 10):
        file.append({"step": step, "loss": 1 / step})
    file.close()
    assert path.read_bytes() == content
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_truncation_to_zero_and_beyond_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3)
    file = MetricsFile(path)
    file.truncate_after(7, 0)
    assert steps(path) == [1, 2, 3]
    file.truncate_after(0, 0)
    assert read_metrics(path) == []
    file.append({"step": 1})
    assert steps(path) == [1]
    file.close()


def test_training_and_evaluation_of_one_step_both_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 2, "loss": 1.0})
    file.append({"step": 2, "eval": {"loss": {"1": [1.0]}}})
    file.append({"step": 3, "loss": 1.0})
    file.truncate_after(2, 0)
    file.close()
    assert steps(path) == [2, 2]


def test_a_torn_line_is_skipped_by_readers_and_dropped_by_writers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    assert steps(path) == [1, 2]
    write(path, 3, 3)
    assert steps(path) == [1, 2, 3]


def test_a_complete_line_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes()[:-1])
    write(path, 3, 3)
    assert steps(path) == [1, 2, 3]


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\n" + lines[2])
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
    file = MetricsFile(path)
    with pytest.raises(DataError, match="line 2"):
        file.truncate_after(1, 0)
    file.append({"step": 4})  # still open
    file.close()
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_line_that_is_no_record_is_refused(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="step"):
        file.append({"loss": 1.0})
    with pytest.raises(TypeError):
        file.append({"step": 1, "loss": object()})
    file.close()
    assert read_metrics(file.path) == []


def test_mean_of_later_windows() -> None:
    assert mean_later_windows([9.0, 1.0, 2.0]) == 1.5
    assert mean_later_windows([9.0, None, 2.0]) == 2.0
    assert mean_later_windows([9.0]) == 9.0
    assert mean_later_windows([9.0, None]) is None
    assert mean_later_windows([]) is None


def test_records_of_later_rollbacks_are_dropped_with_later_steps(tmp_path: Path) -> None:
    """A run that was killed after a rollback goes on before it, and makes it again."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 2, "loss": 1.0})
    for number in (1, 2):
        file.append({"step": 2, "rollback": {"number": number}})
    file.append({"step": 3, "loss": 1.0})
    file.truncate_after(2, 1)
    file.close()
    assert [r.get("rollback", {}).get("number") for r in read_metrics(path)] == [None, 1]
