"""Errors with a message for the user, who is shown no traceback."""

from __future__ import annotations

from collections.abc import Sequence

from sleeptrain.terminal import shown


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


class ConfigError(UserError):
    """A setting is unknown, has a wrong value, or does not go with another."""


class DataError(UserError):
    """A file is missing, damaged, or does not belong with the others."""


class PeerError(DataError):
    """Another process of the run has failed, and says why."""


def told(error: Exception) -> str:
    """What the user is shown of an error that needs no traceback."""
    details = error.details if isinstance(error, UserError) else ()
    lines = [f"sleeptrain: {' '.join(str(error).split())}", *(f"  {line}" for line in details)]
    return "\n".join(shown(line, keep="") for line in lines)


def exit_code(error: BaseException) -> int:
    """The exit code of a process that an error ends."""
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
