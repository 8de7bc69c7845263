"""Errors with a message for the user, shown without a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sleeptrain.terminal import shown

# Error codes of a path that is wrong, has no permission, or lies on a full or read-only disk.
OF_PATHS = (
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.EDQUOT,
)  # fmt: skip


class UserError(Exception):
    """A mistake that the user can mend. Shown without a traceback, one line and a line for each of `details`; exit
    code 2."""

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


class HealthError(Exception):
    """A run ends itself because its numbers cannot be trusted. Shown as one line; exit code 1."""


class NonFiniteError(HealthError):
    """A loss or gradient is NaN or infinite; the message names step, window, pass and layer."""


class SpikeError(HealthError):
    """The loss or the gradient norm lies far above those of the steps before."""


class DivergedError(HealthError):
    """Processes that must hold the same weights do not; the message names them and the first parameter that differs."""


class CheckpointError(Exception):
    """A checkpoint could not be written. For the last checkpoint of a run, shown as one line; exit code 1."""


class MeetingError(Exception):
    """The processes of a run did not meet. Shown as one line; exit code 1, because another start may succeed."""


class ConfigError(UserError):
    """A setting is unknown, has a wrong value, or contradicts another setting."""


class RefusedByAllError(ConfigError):
    """All processes of a run refuse the same settings, and the main process says why: this one prints nothing."""


class DataError(UserError):
    """A file is missing, damaged, or does not fit the other files."""


class LeaseError(UserError):
    """Another process works in the folder, or took it over from this process; the message names that process."""


class PeerError(DataError):
    """Another process of the run failed; the message gives its reason."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn an OSError of the block into a DataError that begins with `what` and names the path."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{what}: {os_reason(error)}") from error


def os_reason(error: OSError) -> str:
    """The path of an error, if it has one, and the reason."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def path_error(error: OSError) -> DataError | None:
    """A DataError if the error names a path that the user can mend; None for other errors and for broken storage."""
    return DataError(os_reason(error)) if error.filename is not None and error.errno in OF_PATHS else None


def format_error(error: Exception) -> str:
    """The lines that the user sees of an error without a traceback."""
    details = error.details if isinstance(error, UserError) else ()
    lines = [f"sleeptrain: {' '.join(str(error).split())}", *(f"  {line}" for line in details)]
    return "\n".join(shown(line, keep="") for line in lines)


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with `error`."""
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


# Errors that are shown as one line without a traceback.
TOLD_IN_A_LINE = (UserError, HealthError, CheckpointError, MeetingError)
