"""Errors with a message for the user, who is shown no traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sleeptrain.terminal import shown

# What the system says of a path that is wrong, closed, or on a disk that is full or read-only.
OF_PATHS = (
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.EDQUOT,
)  # fmt: skip


class UserError(Exception):
    """Shown as one line without a traceback, and a line for each of `details`; the command exits with code 2."""

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


class HealthError(Exception):
    """A run ends itself, since its numbers are not to be trusted. Shown as one line; exit code 1."""


class NonFiniteError(HealthError):
    """A loss or gradient is NaN or infinite; names step, window, pass and layer."""


class SpikeError(HealthError):
    """The loss or the gradient norm lies far above those of the steps before."""


class DivergedError(HealthError):
    """Processes that should hold the same weights do not; names them and the first parameter that differs."""


class CheckpointError(Exception):
    """A checkpoint could not be written. Shown as one line where it was the last of a run; exit code 1."""


class MeetingError(Exception):
    """The processes of a run have not met. Shown as one line; exit code 1, for another start may go well."""


class ConfigError(UserError):
    """A setting is unknown, has a wrong value, or does not go with another."""


class DataError(UserError):
    """A file is missing, damaged, or does not belong with the others."""


class LeaseError(UserError):
    """Another process works in the same folder, or has taken it over from this one; says which."""


class PeerError(DataError):
    """Another process of the run has failed, and says why."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """An OSError of the block becomes a DataError that begins with `what`, and names the path."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{what}: {os_reason(error)}") from error


def os_reason(error: OSError) -> str:
    """The path that an error is about, and why."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def path_error(error: OSError) -> DataError | None:
    """The same of a path that the user can mend; None of an error that is not about a path, or of broken storage."""
    return DataError(os_reason(error)) if error.filename is not None and error.errno in OF_PATHS else None


def format_error(error: Exception) -> str:
    """What the user is shown of an error that needs no traceback."""
    details = error.details if isinstance(error, UserError) else ()
    lines = [f"sleeptrain: {' '.join(str(error).split())}", *(f"  {line}" for line in details)]
    return "\n".join(shown(line, keep="") for line in lines)


def exit_code(error: BaseException) -> int:
    """The exit code of a process that an error ends."""
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


# What is told in one line without a traceback.
TOLD_IN_A_LINE = (UserError, HealthError, CheckpointError, MeetingError)
