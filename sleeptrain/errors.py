"""Errors with a message for the user, who is shown no traceback."""


class UserError(Exception):
    """Shown as one line without a traceback; the command exits with code 2."""


class NonFiniteError(Exception):
    """A loss or gradient is NaN or infinite; names step, window, pass and layer. Shown as one line; exit code 1."""


class CheckpointError(Exception):
    """A checkpoint could not be written. Shown as one line where it was the last of a run; exit code 1."""


class ConfigError(UserError):
    """A setting is unknown, has a wrong value, or does not go with another."""


class DataError(UserError):
    """A file is missing, damaged, or does not belong with the others."""


class PeerError(DataError):
    """Another process of the run has failed, and says why."""
