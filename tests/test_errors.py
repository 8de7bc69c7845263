"""The lines of an error that a user sees, and the exit code of the process."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from sleeptrain.errors import (
    TOLD_IN_A_LINE,
    CheckpointError,
    ConfigError,
    DataError,
    HealthError,
    LeaseError,
    MeetingError,
    NonFiniteError,
    UserError,
    exit_code,
    format_error,
    naming,
    os_reason,
    path_error,
)


def test_an_error_is_a_line_and_one_for_each_detail() -> None:
    assert format_error(ConfigError("two\n  lines", ["first", "second"])) == "sleeptrain: two lines\n  first\n  second"
    assert format_error(HealthError("a loss is NaN")) == "sleeptrain: a loss is NaN"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x"), 2),
        (LeaseError("x"), 2),
        (NonFiniteError("x"), 1),
        (CheckpointError("x"), 1),
        (MeetingError("x"), 1),
        (RuntimeError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_mistakes_of_the_user_have_their_own_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code
    assert isinstance(error, TOLD_IN_A_LINE) is (type(error) not in (RuntimeError, KeyboardInterrupt))


def test_an_error_of_the_system_names_its_path(tmp_path: Path) -> None:
    words = r"^the tokenizer: .*/absent: No such file or directory$"
    with pytest.raises(DataError, match=words) as refused, naming("the tokenizer"):
        (tmp_path / "absent").read_bytes()
    assert isinstance(refused.value.__cause__, FileNotFoundError)


def test_other_errors_stay() -> None:
    with pytest.raises(ValueError, match="mine"), naming("it"):
        raise ValueError("mine")


def test_a_reason_without_a_path_or_words() -> None:
    assert os_reason(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert os_reason(OSError("of a library")) == "of a library"
    assert os_reason(TimeoutError()) == "TimeoutError"


def test_a_path_that_the_user_can_correct_is_a_user_error() -> None:
    full = path_error(OSError(errno.ENOSPC, "No space left on device", "/runs/r"))
    assert isinstance(full, DataError) and str(full) == "/runs/r: No space left on device"
    assert path_error(OSError(errno.EIO, "Input/output error", "/runs/r")) is None, "broken storage"
    assert path_error(OSError(errno.ENOSPC, "No space left on device")) is None, "of no path"
